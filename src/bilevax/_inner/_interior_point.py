"""A primal-dual interior point method: for minima under constraints, of moderate size."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._linear._in_turn import factorise
from .._problem import AbstractCondition
from .._problem._constrained import MOST_DENSE
from .._problem._fixed import once_if_fixed
from .._tree import default_rtol, tree_norm, tree_where
from ._base import AbstractInnerSolver, Counts, InnerSolution, measure
from ._quadratic import check_inequalities

# Of the way to the boundary, what a step may take.
_FRACTION = 0.995
# Steps that the boundary makes shorter are not corrected.
_SHORT = 0.1
# Of the accuracy asked for, before these.
_ENOUGH = 0.1
# Of the error before, what is progress; and how many steps may make none.
_SLOWER = 0.9
_PATIENCE = 10
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
    max_variables: int = MOST_DENSE

    def __check_init__(self) -> None:
        check_tolerance("InteriorPoint", rtol=self.rtol, atol=self.atol)
        check_count("InteriorPoint", max_steps=self.max_steps, max_variables=self.max_variables)

    def with_rtol(self, rtol: Scalar) -> "InteriorPoint":
        return eqx.tree_at(lambda s: s.rtol, self, rtol, is_leaf=lambda leaf: leaf is None)

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del x0, theta
        check_inequalities(condition, "InteriorPoint")

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        del state
        at: Any = condition
        flat, back = ravel_pytree(x0)
        if flat.size > self.max_variables:
            raise ValueError(
                f"`InteriorPoint` forms dense matrices of {flat.size} variables and multipliers, "
                f"and max_variables={self.max_variables}: raise it, take bx.Clarabel() for "
                "a quadratic program, or give a solver that returns a bx.PrimalDual, "
                "bx.External(fn)."
            )
        program = _Program(at, theta, x0)
        rtol = default_rtol(x0) if self.rtol is None else self.rtol

        def is_running(s: _Iterate) -> Bool[Array, ""]:
            return ~s.is_done & (s.num_steps < self.max_steps)

        first = program.start(x0)
        enough = _ENOUGH * jnp.asarray(rtol, flat.dtype)
        last = jax.lax.while_loop(is_running, lambda s: program.step(s, enough), first)
        found = at.refined(back(jnp.concatenate(last.best[:3])), theta)
        count = last.num_steps
        counts = Counts(gradients=count, hessian=count * last.best.x.size)
        solution = measure(condition, found, x0, theta, rtol, self.atol, count, counts)
        return solution, None


class _Point(NamedTuple):
    x: Float[Array, " n"]
    nu: Float[Array, " p"]  # of the equations
    mu: Float[Array, " m"]  # of the inequalities
    s: Float[Array, " m"]  # their slacks


class _Iterate(NamedTuple):
    at: _Point
    best: _Point
    error: Scalar  # of the best
    num_late: Int[Array, ""]  # steps since then
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

    def constraints(self, x: Array) -> tuple[Array, Array]:
        return self.condition.constraints(self.back(x), self.theta)

    def gradient(self, x: Array, nu: Array, mu: Array) -> Array:
        """Of the Lagrange function."""
        _, pull = jax.vjp(self.constraints, x)
        return jax.grad(self.objective)(x) + pull((nu, mu))[0]

    def start(self, x0: PyTree) -> _Iterate:
        x, nu, mu = (ravel_pytree(part)[0] for part in (x0.x, x0.equality, x0.inequality))
        nu, mu = nu.astype(x.dtype), mu.astype(x.dtype)
        s = jnp.maximum(-self.constraints(x)[1], 1)
        zero = jnp.zeros((), jnp.int32)
        at = _Point(x, nu, jnp.maximum(mu, 1), s)
        return _Iterate(at, at, jnp.full((), jnp.inf, x.dtype), zero, zero, jnp.array(False))

    def step(self, now: _Iterate, enough: Scalar) -> _Iterate:
        x, nu, mu, s = now.at
        eps = 10 * float(jnp.finfo(x.dtype).eps)
        num = max(s.size, 1)

        dual, hessian = self.gradient(x, nu, mu), self.hessian(x, nu, mu)
        C, G = self.derivatives(x)
        equal, less = self.constraints(x)
        primal = less + s
        # 1. how far away is this one?
        terms = jnp.concatenate([hessian @ x, G.T @ mu, C.T @ nu, dual - G.T @ mu - C.T @ nu])
        sizes = jnp.concatenate([C @ x, G @ x, s])
        unit = tree_norm(terms) / _or_one(jnp.max(jnp.abs(G), initial=0))
        error = tree_norm(dual) / _or_one(tree_norm(terms))
        error += tree_norm(jnp.concatenate([equal, primal])) / _or_one(tree_norm(sizes))
        # Which of a multiplier and its slack is zero has to be seen, not only that one is small.
        of_mu = mu / _or_one(jnp.maximum(jnp.max(mu, initial=0), unit))
        error += tree_norm(jnp.minimum(of_mu, s / _or_one(tree_norm(sizes))))
        is_better = error < now.error
        num_late = jnp.where(error < _SLOWER * now.error, 0, now.num_late + 1)
        best = tree_where(is_better, now.at, now.best)
        # 2. the step
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
        centre = (ahead / _or_one(gap)) ** 3 * gap
        # What the correction says of a whole step says nothing of a short one, and may lead round
        # in circles.
        moves = direction(centre - jnp.where(length < _SHORT, 0, dmu * ds))
        length = _longest((mu, s), moves[2:])
        new = _Point(*(a + length * d for a, d in zip(now.at, moves, strict=True)))
        is_usable = jnp.all(jnp.isfinite(jnp.concatenate(new)))
        is_usable &= jnp.max(new.mu, initial=0) < _LARGEST
        is_done = (error <= enough) | (num_late >= _PATIENCE) | ~is_usable
        error = jnp.minimum(error, now.error)
        return _Iterate(new, best, error, num_late, now.num_steps + 1, is_done)


def _or_one(a: Scalar) -> Scalar:
    return jnp.where(a > 0, a, 1)


def _solver(matrix: Array, C: Array, eps: float) -> Callable[[Array], Array]:
    """Solves with `[[matrix, C'], [C, -eps]]`.

    Without equations `matrix` is made positive definite where it is not, so that every step leads
    downhill; with them only its part along them would have to be.
    """
    if C.shape[0] == 0:
        factor = _definite(matrix)
        return lambda b: jax.scipy.linalg.cho_solve((factor, True), b)
    corner = -eps * jnp.eye(C.shape[0], dtype=C.dtype)
    block = jnp.block([[matrix, C.T], [C, corner]])
    factors = factorise(jax.scipy.linalg.lu_factor, block)
    return lambda b: jax.scipy.linalg.lu_solve(factors, b)


def _definite(matrix: Array) -> Array:
    """The Cholesky factor of the matrix plus the first shift that makes it definite.

    The loop is around the factorisations of a batch, and mostly takes no step.
    """
    largest = jnp.max(jnp.abs(matrix))

    def factor(matrix: Array) -> Array:
        return factorise(partial(jax.lax.linalg.cholesky, symmetrize_input=False), matrix)

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
