"""A primal-dual interior point method: for minima under constraints, of moderate size."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._problem import AbstractCondition
from .._tree import default_rtol, tree_norm, tree_where
from ._base import AbstractInnerSolver, Counts, InnerSolution, measure

# Of the way to the boundary, what a step may take.
_FRACTION = 0.99
# Newton steps on the active constraints, after the last step from inside.
_POLISHES = 3
# Of the accuracy asked for, before these.
_ENOUGH = 1e-2
# Multipliers beyond this belong to constraints that contradict each other.
_LARGEST = 1e12


class InteriorPoint(AbstractInnerSolver):
    """The default for `bx.ConstrainedMinimum` with inequalities.

    Newton's method on the KKT conditions with slacks, `g + s = 0`, kept inside `s > 0`,
    `mu > 0` by shortened steps towards the central path, with Mehrotra's predictor and corrector.
    The start need not be feasible. At the end Newton's method on the constraints that are active
    leaves the multipliers of the others exactly zero.

    **Arguments:**

    - `rtol`, `atol`: of the residual of the KKT conditions, as in `bx.NewtonCG`.
    - `max_steps`: the most steps; quadratic programs take ten to twenty.
    - `max_variables`: of more, x and multipliers together, it is refused: the matrices are dense.

    **Cost:** a Hessian and the derivatives of the constraints a step, formed, and two solves with
    a dense matrix of the size of x and the equations.

    **Exact when** the problem is convex; a nonconvex one may end at any KKT point, or flagged.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.InteriorPoint(rtol=1e-10)
        ```

    Reference: Mehrotra, "On the implementation of a primal-dual interior point method", 1992;
    Boyd and Vandenberghe, "Convex optimization", 2004, section 11.7.
    """

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    max_steps: int = 100
    max_variables: int = 2_000

    def __check_init__(self) -> None:
        check_tolerance("InteriorPoint", rtol=self.rtol, atol=self.atol)
        check_count("InteriorPoint", max_steps=self.max_steps, max_variables=self.max_variables)

    def with_rtol(self, rtol: Scalar) -> "InteriorPoint":
        return eqx.tree_at(lambda s: s.rtol, self, rtol, is_leaf=lambda leaf: leaf is None)

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del x0, theta
        if not condition.has_inequalities:
            raise TypeError(
                "`InteriorPoint` solves a bx.ConstrainedMinimum(..., inequality=...); the inner "
                f"problem is a {type(condition).__name__} without inequalities. Leave out the "
                "solver, or use bx.NewtonCG() or bx.LBFGS() for a minimum."
            )

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        del state
        at: Any = condition
        flat, back = ravel_pytree(x0)
        if flat.size > self.max_variables:
            raise ValueError(
                f"`InteriorPoint` forms dense matrices of {flat.size} variables and multipliers, "
                f"and max_variables={self.max_variables}: raise it, or give a solver that returns "
                "a bx.PrimalDual, bx.External(fn) or bx.Traceable(fn)."
            )
        program = _Program(at, theta, x0)
        rtol = default_rtol(x0) if self.rtol is None else self.rtol

        def is_running(s: _Iterate) -> Bool[Array, ""]:
            return ~s.is_done & (s.num_steps < self.max_steps)

        first = program.start(x0)
        enough = _ENOUGH * jnp.asarray(rtol, flat.dtype)
        last = jax.lax.while_loop(is_running, lambda s: program.step(s, enough), first)
        found = back(jnp.concatenate([last.x, last.nu, last.mu]))
        residual = tree_norm(at.residual(found, theta))
        for _ in range(_POLISHES):
            found, residual = _polished(at, theta, found, residual)
        count = last.num_steps
        counts = Counts(gradients=count, hessian=count * last.x.size)
        solution = measure(condition, found, x0, theta, rtol, self.atol, count, counts)
        return solution, None


class _Iterate(NamedTuple):
    x: Float[Array, " n"]
    nu: Float[Array, " p"]  # of the equations
    mu: Float[Array, " m"]  # of the inequalities
    s: Float[Array, " m"]  # their slacks
    num_steps: Int[Array, ""]
    is_done: Bool[Array, ""]


class _Program:
    """The problem as functions of a vector."""

    def __init__(self, condition: Any, theta: PyTree, x0: PyTree) -> None:
        self.condition, self.theta = condition, theta
        self.back = ravel_pytree(x0.x)[1]

    def objective(self, x: Array) -> Scalar:
        return self.condition(self.back(x), self.theta)

    def equations(self, x: Array) -> Array:
        return self.condition.constraints(self.back(x), self.theta)[0].astype(x.dtype)

    def inequalities(self, x: Array) -> Array:
        return self.condition.constraints(self.back(x), self.theta)[1].astype(x.dtype)

    def start(self, x0: PyTree) -> _Iterate:
        x, nu, mu = (ravel_pytree(part)[0] for part in (x0.x, x0.equality, x0.inequality))
        nu, mu = nu.astype(x.dtype), mu.astype(x.dtype)
        s = jnp.maximum(-self.inequalities(x), 1)
        zero = jnp.zeros((), jnp.int32)
        return _Iterate(x, nu, jnp.maximum(mu, 1), s, zero, jnp.array(False))

    def step(self, at: _Iterate, enough: Scalar) -> _Iterate:
        x, nu, mu, s = at[:4]
        eps = 10 * float(jnp.finfo(x.dtype).eps)
        num = max(s.size, 1)

        def gradient(x: Array) -> Array:
            along = jax.grad(self.objective)(x)
            _, pull = jax.vjp(lambda x: (self.equations(x), self.inequalities(x)), x)
            return along + pull((nu, mu))[0]

        dual, hessian = gradient(x), jax.jacfwd(gradient)(x)
        C, G = jax.jacfwd(self.equations)(x), jax.jacfwd(self.inequalities)(x)
        equal, primal = self.equations(x), self.inequalities(x) + s
        matrix = hessian + G.T @ ((mu / s)[:, None] * G)
        # No row without a pivot: of the dependent, and of directions that nothing bends.
        small = eps * jnp.maximum(jnp.max(jnp.abs(matrix), initial=0), 1)
        block = jnp.block(
            [
                [matrix + small * jnp.eye(x.size, dtype=x.dtype), C.T],
                [C, -eps * jnp.eye(nu.size, dtype=x.dtype)],
            ]
        )
        factors = jax.scipy.linalg.lu_factor(block)

        def direction(products: Array) -> tuple[Array, ...]:
            """Towards `mu s = products`."""
            ahead = mu * s - products
            right = jnp.concatenate([dual + G.T @ ((mu * primal - ahead) / s), equal])
            both = jax.scipy.linalg.lu_solve(factors, -right)
            dx, dnu = both[: x.size], both[x.size :]
            ds = -primal - G @ dx
            return dx, dnu, -(ahead + mu * ds) / s, ds

        gap = jnp.sum(mu * s) / num
        _, _, dmu, ds = direction(jnp.zeros_like(s))
        length = _longest((mu, s), (dmu, ds))
        ahead = jnp.sum((mu + length * dmu) * (s + length * ds)) / num
        centre = (ahead / jnp.where(gap > 0, gap, 1)) ** 3 * gap
        moves = direction(centre - dmu * ds)
        length = _longest((mu, s), moves[2:])
        new = [a + length * d for a, d in zip((x, nu, mu, s), moves, strict=True)]
        is_finite = jnp.all(jnp.isfinite(jnp.concatenate(new)))
        size = jnp.linalg.norm(jnp.concatenate([hessian @ x, G.T @ mu, C.T @ nu])) + 1
        left = jnp.linalg.norm(jnp.concatenate([dual, equal, primal]))
        is_done = (left <= enough * size) & (gap <= enough * size)
        is_finite &= jnp.max(new[2], initial=0) < _LARGEST
        x, nu, mu, s = tree_where(is_finite & ~is_done, tuple(new), (x, nu, mu, s))
        return _Iterate(x, nu, mu, s, at.num_steps + 1, is_done | ~is_finite)


def _longest(values: tuple[Array, ...], moves: tuple[Array, ...]) -> Scalar:
    """The longest step, at most one, that leaves all values positive."""
    value, move = jnp.concatenate(values), jnp.concatenate(moves)
    ratios = jnp.where(move < 0, -value / jnp.where(move < 0, move, -1), jnp.inf)
    return jnp.minimum(1, _FRACTION * jnp.min(ratios, initial=jnp.inf))


def _polished(condition: Any, theta: PyTree, x: PyTree, residual: Scalar) -> tuple[PyTree, Scalar]:
    """X after Newton's method on what is active, if that makes the residual smaller."""
    new = jtu.tree_map(jnp.add, x, condition.newton_step(x, theta))
    size = tree_norm(condition.residual(new, theta))
    is_better = size < residual
    return tree_where(is_better, new, x), jnp.where(is_better, size, residual)
