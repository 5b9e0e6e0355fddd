"""What solvers by proximal steps share: how many they take, and when they stop."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_positive, check_tolerance
from .._problem import AbstractCondition
from .._tree import tree_norm
from ._base import AbstractSteppingSolver, Counts, InnerSolution, measure, residual_and_scale, run


class AbstractProximalSteps(AbstractSteppingSolver):
    """Steps for a `bx.ProximalMinimum`, a number of them or until the residual is small.

    The last two entries of the carry are the tolerance and whether the last step met it.
    """

    num_steps: eqx.AbstractVar[int]
    rtol: eqx.AbstractVar[float | Scalar | None]
    atol: eqx.AbstractVar[float | Scalar | None]

    def check(self) -> None:
        """The options."""
        check_positive(self.num_steps, "num_steps")
        check_tolerance(type(self).__name__, rtol=self.rtol, atol=self.atol)

    @property
    def max_steps(self) -> int:
        return self.num_steps

    @property
    def is_fixed_length(self) -> bool:
        return self.rtol is None and self.atol is None

    def with_rtol(self, rtol: Scalar) -> "AbstractProximalSteps | None":
        if self.is_fixed_length:
            return None
        return eqx.tree_at(lambda s: s.rtol, self, rtol, is_leaf=lambda leaf: leaf is None)

    def endless(self, carry: PyTree[Array]) -> "tuple[AbstractProximalSteps, PyTree[Array]]":
        endless = eqx.tree_at(
            lambda s: (s.rtol, s.atol), self, (None, None), is_leaf=lambda leaf: leaf is None
        )
        return endless, carry

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del condition, x0, theta

    @abc.abstractmethod
    def prepared(self, condition: Any, x0: PyTree, theta: PyTree) -> tuple[Any, Any]:
        """This solver and the condition, what is the same for all steps worked out once."""

    def is_done(self, carry: PyTree[Array]) -> Array | bool:
        return False if self.is_fixed_length else carry[-1]

    def finish(self, condition: AbstractCondition, carry: PyTree[Array]) -> tuple[PyTree, PyTree]:
        del condition
        return carry[0], None

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        minimum = proximal(condition, type(self).__name__)
        solver, condition = self.prepared(minimum, x0, theta)
        carry, count = run(solver, condition, theta, solver.start(condition, x0, theta, state))
        x, _ = self.finish(condition, carry)
        counts = self.counts(count, x0)
        return measure(condition, x, x0, theta, self.rtol, self.atol, count, counts), None

    def counts(self, num_steps: Int[Array, ""], x: PyTree) -> Counts:
        """What the steps cost."""
        del x
        return Counts(gradients=2 * num_steps)

    def tolerance_at_start(self, condition: Any, x0: PyTree, theta: PyTree) -> Scalar:
        """A guess, to be measured where it decides; zero where all steps are taken."""
        if self.is_fixed_length:
            return jnp.zeros_like(tree_norm(x0))
        residual, scale = residual_and_scale(condition, x0, x0, theta)
        return self._tolerance(jnp.maximum(scale, residual))

    def judged(
        self,
        condition: Any,
        x: PyTree,
        theta: PyTree,
        residual: Scalar,
        tolerance: Scalar,
        is_step: Bool[Array, ""] | bool = True,
    ) -> tuple[Scalar, Bool[Array, ""]]:
        """The tolerance, and whether the residual at x meets it."""
        is_small = is_step & (residual <= tolerance)
        tolerance = jax.lax.cond(
            is_small,
            lambda: self._tolerance(residual_and_scale(condition, x, x, theta)[1]),
            lambda: tolerance,
        )
        return tolerance, is_small & (residual <= tolerance)

    def _tolerance(self, scale: Scalar) -> Scalar:
        rtol = 0.0 if self.rtol is None else self.rtol
        return (0.0 if self.atol is None else self.atol) + rtol * scale


def proximal(condition: AbstractCondition, name: str) -> Any:
    """The condition, if it is a minimum with a proximal step."""
    if condition.nonsmooth is None:
        raise TypeError(
            f"`{name}` takes the steps of a bx.ProximalMinimum(fn, prox); the inner problem is a "
            f"{type(condition).__name__}. Use bx.NewtonCG() or bx.LBFGS() for a smooth minimum."
        )
    return condition
