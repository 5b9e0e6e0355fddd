"""Inner solvers: `condition, x0, theta -> InnerSolution`."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Scalar

from .._as_written import OneLine
from .._problem import AbstractCondition
from .._results import RESULTS
from .._tree import default_rtol, tree_all_finite
from ._kinks import flag_kink
from ._newton_direction import ROUNDING
from ._own_scale import compare, norm, own_magnitude


class Counts(eqx.Module):
    """How often the oracles of a problem were called.

    A Hessian product is a product with the derivative of the inner residual in `x` (or
    its transpose), a cross product one with its derivative in `theta`.
    """

    num_gradients: Int[Array, ""]
    num_hessian_products: Int[Array, ""]
    num_cross_products: Int[Array, ""]

    def __init__(self, gradients: object = 0, hessian: object = 0, cross: object = 0) -> None:
        self.num_gradients = jnp.asarray(gradients, jnp.int32)
        self.num_hessian_products = jnp.asarray(hessian, jnp.int32)
        self.num_cross_products = jnp.asarray(cross, jnp.int32)

    def __add__(self, other: "Counts") -> "Counts":
        return jax.tree_util.tree_map(jnp.add, self, other)


class InnerSolution(eqx.Module):
    """What an inner solver found.

    Law: `result` is successful exactly if `residual <= tolerance`, where `residual` is the
    two-norm of `condition.residual(x, theta)`, measured at the returned `x`.
    """

    x: PyTree[Array]
    residual: Scalar
    tolerance: Scalar
    num_steps: Int[Array, ""]
    result: RESULTS
    counts: Counts


class AbstractInnerSolver(OneLine, eqx.Module):
    """Finds `x*(theta)`.

    `state` is what the solver itself carries from one outer step to the next (an
    optimiser's moments, say); most solvers have none. The warm start from the previous
    `x` is not in it: it arrives as `x0`.
    """

    # Whether it finds x at any theta within a compiled program.
    solves_anywhere: ClassVar[bool] = True
    # Whether the host solves for x, before each compiled program that needs it.
    needs_host: ClassVar[bool] = False

    @property
    def in_program(self) -> "AbstractInnerSolver":
        """The solver inside a compiled program, for which the host has done its part."""
        return self

    def before(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree
    ) -> "tuple[AbstractInnerSolver, PyTree]":
        """`in_program`, and its start, after the host has done its part."""
        del condition, theta
        return self.in_program, x0

    @property
    def algorithm(self) -> Any:
        """What makes the steps: this solver, or the one that it wraps."""
        return self

    @property
    def may_use_theta(self) -> bool:
        """Whether theta may reach the steps by another way than the condition."""
        return type(self).__module__.split(".")[0] != __name__.split(".")[0]

    @abc.abstractmethod
    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        """The state before the first solve."""

    @abc.abstractmethod
    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        """The solution from `x0`, and the state for the next solve. Not differentiated."""

    def factorised(self, max_steps: int) -> "AbstractInnerSolver":
        """The solver for few variables that forms the Hessian, in at most so many steps.

        This one, if it has no such choice or its user has made it.
        """
        del max_steps
        return self

    @property
    def is_repeatable(self) -> bool:
        """Whether `solve` finds the same x again, whatever the state."""
        return True

    def with_rtol(self, rtol: Scalar) -> "AbstractInnerSolver | None":
        """This solver with another relative tolerance, a number or traced.

        `None` if its accuracy is not for us to choose: a black box, a fixed number of steps.
        """
        del rtol
        return None


class AbstractSteppingSolver(AbstractInnerSolver):
    """An inner solver that is a loop over `step`, and so can be unrolled.

    The carry is a tuple of pytrees of arrays, the first of them `x`. Law: `solve` is
    `finish` of the carry after repeating `step` until `is_done`, at most `max_steps` times.
    """

    # Whether each step moves x by a smooth function of the gradient there.
    steps_by_gradient: ClassVar[bool] = False

    max_steps: eqx.AbstractVar[int]

    @property
    @abc.abstractmethod
    def is_fixed_length(self) -> bool:
        """Whether it always takes exactly `max_steps` steps."""

    def endless(self, carry: PyTree[Array]) -> "tuple[AbstractSteppingSolver, PyTree[Array]]":
        """The solver without its stopping test, and its carry, for steps beyond the last.

        A step that finds itself at the tolerance is none: it leaves x where it is, and its
        derivative says that theta has no influence.
        """
        return self, carry

    @abc.abstractmethod
    def start(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> PyTree[Array]:
        """The carry before the first step."""

    @abc.abstractmethod
    def step(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> PyTree[Array]:
        """One update of the algorithm."""

    @abc.abstractmethod
    def is_done(self, carry: PyTree[Array]) -> Array | bool:
        """Whether to stop; the constant `False` for a fixed number of steps."""

    @abc.abstractmethod
    def finish(self, condition: AbstractCondition, carry: PyTree[Array]) -> tuple[PyTree, PyTree]:
        """`x` and the solver's state for the next solve."""


def measure(
    condition: AbstractCondition,
    x: PyTree,
    x0: PyTree,
    theta: PyTree,
    rtol: Array | float | None,
    atol: Array | float | None,
    num_steps: object,
    counts: Counts,
) -> InnerSolution:
    """The evidence for an `x` that came from anywhere.

    The residual is compared with the size of the terms that cancel in it, `||A x||` in
    all and row by row (see `_own_scale.py`): for `U = 1/2 x'Ax - c'x` that is `||c||`. One
    gradient and one or two Hessian products.
    """
    rtol = default_rtol(x) if rtol is None else rtol
    g, product = jax.linearize(lambda x: condition.residual(x, theta), x)
    residual = norm(g)

    def tolerance_of(scale: Scalar) -> Scalar:
        return (0.0 if atol is None else atol) + rtol * scale

    sizes = own_magnitude(condition.magnitude(x), x0)
    seen = compare(g, product, sizes, lambda scale: residual <= tolerance_of(scale))
    scale, tolerance = seen.scale, tolerance_of(seen.scale)
    # A gradient is a difference of terms of size `scale`: this much of it is rounding.
    floor = ROUNDING * float(jnp.finfo(residual.dtype).eps) * scale
    result = RESULTS.where(residual <= floor, RESULTS.stalled, RESULTS.inner_not_converged)
    result = RESULTS.where(residual <= tolerance, RESULTS.successful, result)
    finite = jnp.isfinite(residual) & tree_all_finite(x)
    result = RESULTS.where(finite, result, RESULTS.nonfinite)
    result = flag_kink(condition, x, x0, theta, scale, result)
    # At a kink a variable may be zero up to rounding, and small by no measure of its own.
    verdict = condition.verdict(x, theta, residual, jnp.maximum(tolerance, floor))
    is_judged = finite & (verdict != RESULTS.successful) & (result != RESULTS.not_smooth)
    result = RESULTS.where(is_judged, verdict, result)
    return InnerSolution(
        x=x,
        residual=residual,
        tolerance=tolerance,
        num_steps=jnp.asarray(num_steps, jnp.int32),
        result=result,
        counts=counts + Counts(gradients=1, hessian=seen.num_products),
    )


def residual_and_scale(
    condition: AbstractCondition, x: PyTree, x0: PyTree, theta: PyTree
) -> tuple[Scalar, Scalar]:
    """`||residual||` and the size it is compared with, row by row; see `measure`."""
    residual, product = jax.linearize(lambda x: condition.residual(x, theta), x)
    sizes = own_magnitude(condition.magnitude(x), x0)
    return norm(residual), compare(residual, product, sizes).scale


def run(
    solver: AbstractSteppingSolver,
    condition: AbstractCondition,
    theta: PyTree,
    carry: PyTree[Array],
    max_steps: Array | int | None = None,
) -> tuple[PyTree[Array], Int[Array, ""]]:
    """Repeat `step` until `is_done`, at most `max_steps` times. Not differentiable.

    Returns the last carry and the number of steps.
    """
    limit = solver.max_steps if max_steps is None else max_steps

    def keep_going(state: tuple) -> Array:
        carry, count = state
        return (count < limit) & jnp.logical_not(solver.is_done(carry))

    def body(state: tuple) -> tuple:
        carry, count = state
        return solver.step(condition, theta, carry), count + 1

    return jax.lax.while_loop(keep_going, body, (carry, jnp.asarray(0, jnp.int32)))
