"""Outer methods: `init`, `evaluate`, `step`."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, PyTree

from .._as_written import OneLine
from .._hypergradient._base import AbstractHypergradient
from .._problem import Bilevel
from ._evaluation import Evaluation


class AbstractMethod(OneLine, eqx.Module):
    """Moves theta.

    Law: a run is `init`, then by turns one `evaluate` and `interval` times `step`; it ends
    with an evaluation. The state has a `theta`, the one that the run would end at, which
    `evaluate` leaves where it is, and an `x`, where the next search for one begins; it is a
    pytree whose arrays keep shapes and dtypes.
    """

    # How many steps there are from one evaluation to the next.
    @property
    def interval(self) -> int:
        return 1

    @abc.abstractmethod
    def init(self, problem: Bilevel, x0: PyTree, theta: PyTree) -> Any:
        """The state before the first evaluation. `x0` may be a function of theta."""

    @abc.abstractmethod
    def evaluate(
        self, problem: Bilevel, x0: PyTree, state: Any, is_last: Bool[Array, ""]
    ) -> tuple[Evaluation, Any]:
        """What there is to know at `state.theta`, or at a trial that the method wants to see.

        `is_last`: no step follows, and it is `state.theta` that is meant.
        """

    @abc.abstractmethod
    def step(self, problem: Bilevel, state: Any, seen: Evaluation) -> Any:
        """One outer step, `seen` being the last evaluation."""

    def with_rule(self, rule: AbstractHypergradient) -> "AbstractMethod | None":
        """The method with this rule; `None` if it has one of its own, or none at all."""
        del rule
        return None

    @property
    def needs_host(self) -> bool:
        """Whether the host has a part in every evaluation, so that they come one by one."""
        return False

    def on_host(self, problem: Bilevel, x0: PyTree, state: Any, is_last: bool) -> Any:
        """The state after the host has done its part of the next evaluation."""
        del problem, x0, is_last
        return state

    def for_singular(self) -> "AbstractMethod | None":
        """The method to go on with, from the same state, where the adjoint system is singular.

        `None` if the user has chosen what happens then.
        """
        return None
