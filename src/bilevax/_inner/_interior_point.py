"""A primal-dual interior point method: for minima under constraints, of moderate size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._linear._in_turn import in_turn
from .._problem import AbstractCondition
from .._problem._fixed import once_if_fixed
from .._tree import default_rtol, largest_entry, tree_dtype, tree_norm, tree_where
from ._base import AbstractInnerSolver, Counts, InnerSolution, measure

# Of the way to the boundary, what a step may take.
_FRACTION = 0.995
# Newton steps on the active constraints, after the last step from inside.
_POLISHES = 3
# Of the accuracy asked for, before these.
_ENOUGH = 1e-1
# Multipliers beyond this belong to constraints that contradict each other.
_LARGEST = 1e12
# Of the largest entry of a matrix that is not definite.
_FIRST_SHIFT = 1e-4


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
        found = program.without_rounding(_polished(at, theta, found))
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
        x, self.back = ravel_pytree(x0.x)
        nu, mu = (ravel_pytree(part)[0].astype(x.dtype) for part in x0[1:])
        # Of a quadratic program they are the same at every step.
        self.hessian = once_if_fixed(jax.jacfwd(self.gradient), x, nu, mu)
        self.derivatives = once_if_fixed(jax.jacfwd(self.constraints), x)

    def objective(self, x: Array) -> Scalar:
        return self.condition(self.back(x), self.theta)

    def equations(self, x: Array) -> Array:
        return self.condition.constraints(self.back(x), self.theta)[0].astype(x.dtype)

    def inequalities(self, x: Array) -> Array:
        return self.condition.constraints(self.back(x), self.theta)[1].astype(x.dtype)

    def constraints(self, x: Array) -> tuple[Array, Array]:
        return self.equations(x), self.inequalities(x)

    def gradient(self, x: Array, nu: Array, mu: Array) -> Array:
        """Of the Lagrange function."""
        _, pull = jax.vjp(self.constraints, x)
        return jax.grad(self.objective)(x) + pull((nu, mu))[0]

    def start(self, x0: PyTree) -> _Iterate:
        x, nu, mu = (ravel_pytree(part)[0] for part in (x0.x, x0.equality, x0.inequality))
        nu, mu = nu.astype(x.dtype), mu.astype(x.dtype)
        s = jnp.maximum(-self.inequalities(x), 1)
        zero = jnp.zeros((), jnp.int32)
        return _Iterate(x, nu, jnp.maximum(mu, 1), s, zero, jnp.array(False))

    def without_rounding(self, found: PyTree) -> PyTree:
        """Multipliers that are zero up to rounding are zero, as those of inactive constraints."""
        x = ravel_pytree(found.x)[0]
        along, bent = jax.jvp(jax.grad(self.objective), (x,), (x,))
        rows = largest_entry(self.derivatives(x)[1])
        size = jnp.maximum(jnp.linalg.norm(along), jnp.linalg.norm(bent))
        least = 100 * float(jnp.finfo(x.dtype).eps) * size / jnp.where(rows > 0, rows, 1)
        kept = jtu.tree_map(lambda m: jnp.where(m > least, m, 0), found.inequality)
        return found._replace(inequality=kept)

    def step(self, at: _Iterate, enough: Scalar) -> _Iterate:
        x, nu, mu, s = at[:4]
        eps = 10 * float(jnp.finfo(x.dtype).eps)
        num = max(s.size, 1)

        dual, hessian = self.gradient(x, nu, mu), self.hessian(x, nu, mu)
        C, G = self.derivatives(x)
        equal, primal = self.equations(x), self.inequalities(x) + s
        matrix = hessian + G.T @ ((mu / s)[:, None] * G)
        # No row without a pivot: of the dependent, and of directions that nothing bends.
        small = eps * jnp.maximum(jnp.max(jnp.abs(matrix), initial=0), 1)
        solve = _solver(matrix + small * jnp.eye(x.size, dtype=x.dtype), C, eps)

        def direction(products: Array) -> tuple[Array, ...]:
            """Towards `mu s = products`."""
            ahead = mu * s - products
            right = jnp.concatenate([dual + G.T @ ((mu * primal - ahead) / s), equal])
            both = solve(-right)
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
        # Which of a multiplier and its slack is zero has to be seen, not only that one is small.
        both = jnp.linalg.norm(jnp.minimum(mu, s))
        is_done = (left <= enough * size) & (both <= enough * size)
        is_finite &= jnp.max(new[2], initial=0) < _LARGEST
        x, nu, mu, s = tree_where(is_finite & ~is_done, tuple(new), (x, nu, mu, s))
        return _Iterate(x, nu, mu, s, at.num_steps + 1, is_done | ~is_finite)


def _solver(matrix: Array, C: Array, eps: float) -> Callable[[Array], Array]:
    """Solves with `[[matrix, C'], [C, -eps]]`.

    Without equations `matrix` is made positive definite where it is not, so that every step leads
    downhill; with them only its part along them would have to be.
    """
    if C.shape[0] == 0:
        factor = in_turn(_definite, len(matrix))(matrix)
        return lambda b: jax.scipy.linalg.cho_solve((factor, True), b)
    corner = -eps * jnp.eye(C.shape[0], dtype=C.dtype)
    block = jnp.block([[matrix, C.T], [C, corner]])
    factors = in_turn(_lu, len(block))(block)
    return lambda b: jax.scipy.linalg.lu_solve(factors, b)


def _lu(matrix: Array) -> tuple[Array, Array]:
    return jax.scipy.linalg.lu_factor(matrix)


def _definite(matrix: Array) -> Array:
    """The Cholesky factor of the matrix plus the first shift that makes it definite."""
    largest = jnp.max(jnp.abs(matrix))

    def factor(matrix: Array) -> Array:
        return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)

    def step(carry: tuple[Scalar, Array]) -> tuple[Scalar, Array]:
        shift = jnp.where(carry[0] > 0, 10 * carry[0], _FIRST_SHIFT * largest)
        return shift, factor(matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype))

    def is_running(carry: tuple[Scalar, Array]) -> Bool[Array, ""]:
        return jnp.isnan(carry[1][-1, -1]) & (carry[0] < 10 * len(matrix) * largest)

    zero = jnp.zeros((), matrix.dtype)
    return jax.lax.while_loop(is_running, step, (zero, factor(matrix)))[1]


def _longest(values: tuple[Array, ...], moves: tuple[Array, ...]) -> Scalar:
    """The longest step, at most one, that leaves all values positive."""
    value, move = jnp.concatenate(values), jnp.concatenate(moves)
    ratios = jnp.where(move < 0, -value / jnp.where(move < 0, move, -1), jnp.inf)
    return jnp.minimum(1, _FRACTION * jnp.min(ratios, initial=jnp.inf))


def _polished(condition: Any, theta: PyTree, x: PyTree) -> PyTree:
    """X after Newton's method on what is active, while that makes the residual smaller."""

    def is_running(carry: tuple[PyTree, Scalar, Scalar, Array]) -> Bool[Array, ""]:
        _, size, before, count = carry
        is_open = (count == 0) | ~(size <= rounding)  # the first makes multipliers exactly zero
        return (count < _POLISHES) & (size < before) & is_open

    def step(carry: tuple[PyTree, Scalar, Scalar, Array]) -> tuple:
        x, size, _, count = carry
        new = jtu.tree_map(jnp.add, x, condition.newton_step(x, theta))
        left = tree_norm(condition.residual(new, theta))
        is_better = left < size
        return tree_where(is_better, new, x), jnp.where(is_better, left, size), size, count + 1

    rounding = 100 * float(jnp.finfo(tree_dtype(x)).eps) * (1 + tree_norm(x))
    first = tree_norm(condition.residual(x, theta))
    start = (x, first, jnp.full_like(first, jnp.inf), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(is_running, step, start)[0]
