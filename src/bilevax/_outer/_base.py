"""Outer methods: `init`, `evaluate`, `step`."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._as_written import OneLine
from .._hypergradient._base import AbstractHypergradient
from .._problem import Bilevel
from .._results import RESULTS


class Place(NamedTuple):
    """A theta that was evaluated, the x that was found there, and what came with it."""

    theta: PyTree[Array]
    x: PyTree[Array]
    aux: PyTree


class Evaluation(eqx.Module):
    """What is known of one theta. What a person sees, and what stops a run, is read here only.

    What nobody knows is `None`, in every evaluation of a run.
    """

    place: Place
    value: Scalar
    hypergradient_norm: Scalar
    inner_residual: Scalar
    adjoint_residual: Scalar | None
    error_estimate: Scalar | None
    predicted_decrease: Scalar | None  # of the value, by the optimiser's model, in its next step
    result: RESULTS
    stats: dict[str, Array]  # all oracle calls since the last evaluation
    is_usable: Bool[Array, ""]  # theta may move on it
    is_comparable: Bool[Array, ""]  # usable, and its value is that of a function of theta
    is_random: Bool[Array, ""]  # its value is that of a random function
    value_range: tuple[Scalar, Scalar]  # where that function is, as far as errors are known
    should_stop: Bool[Array, ""]  # the method itself says that it finishes with the next step
    gave_up: Bool[Array, ""]  # the method cannot go on from here
    proposal: PyTree = None  # the method's own, for its next step


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
