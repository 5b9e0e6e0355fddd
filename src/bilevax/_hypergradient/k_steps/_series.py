"""K steps at a solution, where the steps are those of a gradient, a map or an equation."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Scalar

from ..._inner._base import Counts
from ..._linear import LinearSolution, Neumann, verify
from ..._linear._base import AbstractIterativeLinearSolver
from ..._linear._common import find_step_size
from ..._raise import warn_above
from ..._results import RESULTS
from ..._tree import (
    stop_gradient,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_zeros_like,
    unbounded,
)
from .._at_solution import Adjoint
from .._base import Query
from .._call import Call
from .._point import Point
from ..implicit._implicit_function import System, attach_derivative
from ..implicit._rule import solved_or_fail

# A residual above this is worse than no answer at all, which has one.
MOST_LEFT = 1.1
# Above this a view of a rule without an estimate, which would report it, warns.
_MUCH_LEFT = 0.1
_ROUGH = (
    "bx.OneStep(), bx.KStep(...) or bx.JacobianFree() leaves more than a tenth of the adjoint "
    "system unsolved: what comes out is a direction rather than a gradient. Take more steps, "
    "bx.KStep(num_steps=...), or bx.Implicit(); bx.hypergradient reports `adjoint_residual`. If it "
    "is meant, warnings.filterwarnings('ignore', message='bx.OneStep') silences this."
)


class StepSeries(AbstractIterativeLinearSolver):
    """The adjoint of K steps `x - s F(x)`, or `x - s F'^T F(x)` for an equation.

    The first is `Neumann`. The second is Neumann's series of the normal equations,
    `v = s A sum_{j < K} (I - s A^T A)^j b`, where `matvec` is the product with `A^T`.

    Unlike that of `Neumann` a measured step does not depend on `b`: the answer is linear
    in it, so that a jvp and a vjp are derivatives of one function. What diverges after one
    step already is seen, too, since the residual is measured.
    """

    num_terms: int
    step_size: float | Scalar | None
    is_equation: bool

    def measured(self, matvec: Callable[[PyTree], PyTree], like: PyTree) -> "StepSeries":
        """With the step size that the curvature allows, if none was given."""
        if self.step_size is not None:
            return self
        # From a fixed pattern of signs: see largest_eigenvalue.
        start = tree_zeros_like(like)
        step_size, _ = find_step_size(None, self._normal(matvec, like)[0], start)
        return StepSeries(self.num_terms, step_size, self.is_equation)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        del v0, preconditioner
        series = self.measured(matvec, b)
        product, transposed = self._normal(matvec, b)
        right_hand_side = transposed(b) if self.is_equation else b
        solution = Neumann(self.num_terms, series.step_size).solve(product, right_hand_side)
        # Whoever verifies again computes the same product, which the compiler drops.
        checked = verify(solution, b, matvec(solution.value))
        is_worse = (checked.result == RESULTS.successful) & (checked.residual > MOST_LEFT)
        result = RESULTS.where(is_worse, RESULTS.diverged, checked.result)
        return eqx.tree_at(
            lambda s: (s.residual, s.result, s.num_products),
            solution,
            (checked.residual, result, self._num_products(solution.num_products)),
        )

    def _normal(
        self, matvec: Callable[[PyTree], PyTree], like: PyTree
    ) -> tuple[Callable, Callable]:
        """The product whose series it is, and the transpose of `matvec`."""
        if not self.is_equation:
            return matvec, matvec
        pull = jax.linear_transpose(matvec, like)

        def transposed(u: PyTree) -> PyTree:
            return pull(u)[0]

        return (lambda v: transposed(matvec(v))), transposed

    def _num_products(self, of_series: Array) -> Array:
        measuring = 10 if self.step_size is None else 0
        each, first = (2, 1) if self.is_equation else (1, 0)
        return each * (of_series + measuring) + first


def adjoint_by_series(series: StepSeries, at: Point) -> Adjoint:
    """`v` by `series`, and what the terms left out would add."""
    num_measuring = series._num_products(jnp.asarray(0)) - (1 if series.is_equation else 0)
    series = series.measured(at.at.adjoint, at.grad_x)
    # 1. K terms of the adjoint
    adjoint = series.solve(at.at.adjoint, at.grad_x)
    grad, product = at.hypergradient(adjoint.value)
    # 2. the next term, which is the first one left out
    left = tree_sub(at.grad_x, product)
    following = StepSeries(1, series.step_size, series.is_equation)
    next_product, next_cross = at.at.both(following.solve(at.at.adjoint, left).value)
    remainder = geometric_remainder(next_cross, left, tree_sub(left, next_product))
    products = adjoint.num_products + num_measuring + (3 if series.is_equation else 2)
    return Adjoint(
        grad,
        adjoint.value,
        (adjoint.result,),
        Counts(gradients=1, hessian=products, cross=2),
        adjoint.num_steps,
        {"adjoint_residual": adjoint.residual, "error_estimate": remainder},
    )


def attach_series(
    series: StepSeries,
    query: Query,
    x: PyTree[Array],
    throw: bool,
    failed: Bool[Array, ""] | None,
) -> PyTree[Array]:
    """The solution `x`, differentiable by `series` in theta and the arrays of the condition."""
    condition = query.condition
    return _attach(
        series,
        lambda x, args: args[0].residual(x, args[1]),
        (condition, query.theta),
        x,
        condition.is_symmetric,
        throw,
        failed,
    )


def series_of_call(series: StepSeries, call: Call) -> tuple[PyTree[Array], PyTree]:
    """An Optimistix solve, differentiable by `series`."""
    x, rest = call.constant()
    # Optimistix' residual of a fixed point is T(x) - x, whose derivative is negative.
    sign = -1.0 if call.kind == "fixed_point" else 1.0

    def residual(x: PyTree, inputs: PyTree) -> PyTree:
        return tree_scale(sign, call.residual(x, inputs))

    return _attach(series, residual, call.inputs, x, call.is_symmetric, True), rest


def _attach(
    series: StepSeries,
    residual: Callable[[PyTree, PyTree], PyTree],
    args: PyTree,
    x: PyTree[Array],
    is_symmetric: bool,
    throw: bool,
    failed: Bool[Array, ""] | None = None,
) -> PyTree[Array]:
    """`x`, with the derivative in `args` of K steps on `residual(x, args)`.

    `(s A, s B)` with step one is `(A, B)` with step s, and of an equation `sqrt(s)` does
    it: so the step size, which may be traced, is an argument of the rule, not closed over.
    """
    scale = jnp.ones((), tree_dtype(x))
    if series.step_size is not None:
        step_size = jnp.asarray(series.step_size, scale.dtype)
        scale = jnp.sqrt(step_size) if series.is_equation else step_size
        series = StepSeries(series.num_terms, 1.0, series.is_equation)

    return attach_derivative(
        _scaled_residual(residual),
        (args, stop_gradient(scale)),
        x,
        partial(_solve_series, throw=throw),
        series,
        is_symmetric,
        failed,
    )


def _scaled_residual(residual: Callable[[PyTree, PyTree], PyTree]) -> Callable:
    return lambda x, args: tree_scale(args[1], residual(x, args[0]))


def _solve_series(series: StepSeries, system: System, b: PyTree, *, throw: bool) -> PyTree:
    found = series.solve(system.matvec, b)
    value = warn_of_what_is_left(found.value, found.residual)
    return solved_or_fail(eqx.tree_at(lambda s: s.value, found, value), b, throw)


def warn_of_what_is_left(x: PyTree[Array], left: Scalar) -> PyTree[Array]:
    """`x`, where a derivative rule has nowhere to report that it is rough."""
    return warn_above(x, left, _MUCH_LEFT, _ROUGH)


def geometric_remainder(term: PyTree, left: PyTree, further: PyTree) -> Scalar:
    """The norm of all terms from `term` on, if they fall as `left` to `further` does.

    Infinite if they do not fall.
    """
    norm = tree_norm(left)
    ratio = tree_norm(further) / jnp.where(norm > 0, norm, 1)
    falls = ratio < 1
    size = tree_norm(term).astype(ratio.dtype)
    return jnp.where(falls, size / jnp.where(falls, 1 - ratio, 1), unbounded(size))
