"""Outer methods: `problem, state -> state, info`."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._as_written import OneLine
from .._hypergradient._base import AbstractHypergradient
from .._inner._external import External
from .._problem import Bilevel
from .._results import RESULTS


class StepInfo(eqx.Module):
    """What one outer step saw, at the theta it started from. For people, and for stopping.

    What nobody knows is `None`, in every step of a run.
    """

    value: Scalar
    hypergradient_norm: Scalar
    inner_residual: Scalar
    adjoint_residual: Scalar | None
    error_estimate: Scalar | None
    predicted_decrease: Scalar | None  # of the value, by the optimiser's model, in its next step
    result: RESULTS
    stats: dict[str, Array]
    is_usable: Bool[Array, ""]  # theta may move on it
    is_comparable: Bool[Array, ""]  # usable, and its value is that of a function of theta
    is_random: Bool[Array, ""]  # its value is that of a random function
    value_range: tuple[Scalar, Scalar]  # where that function is, as far as errors are known
    should_stop: Bool[Array, ""]  # the method itself says that it has finished
    gave_up: Bool[Array, ""]  # the method cannot go on from here


class AbstractMethod(OneLine, eqx.Module):
    """Moves theta.

    Law: `step(..., move=True)` makes one outer step from `state.theta`, and its info
    belongs to the theta before the step; with `move=False` it evaluates only. The state
    has `theta`, `x` and `aux` (the inner solution and what came with it, of the last
    evaluation), and `point`, the theta of that; it is a pytree whose arrays keep shapes
    and dtypes.
    """

    @abc.abstractmethod
    def init(self, problem: Bilevel, x0: PyTree, theta: PyTree) -> Any:
        """The state before the first step. `x0` may be a function of theta."""

    @abc.abstractmethod
    def step(
        self, problem: Bilevel, x0: PyTree, state: Any, move: Bool[Array, ""]
    ) -> tuple[Any, StepInfo]:
        """One outer step."""

    def with_rule(self, rule: AbstractHypergradient) -> "AbstractMethod | None":
        """The method with this rule; `None` if it has one of its own, or none at all."""
        del rule
        return None

    def for_host(self) -> "tuple[AbstractMethod, External | None, bool]":
        """The method where x comes from a solver on the host, that solver, and whether x stays.

        Before each step the host then solves for x, from the last x if that stays.
        """
        return self, None, False

    def for_singular(self) -> "AbstractMethod | None":
        """The method to go on with, from the same state, where the adjoint system is singular.

        `None` if the user has chosen what happens then.
        """
        return None
