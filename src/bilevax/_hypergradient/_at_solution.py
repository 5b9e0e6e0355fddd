"""The driver of every rule of the form `v = M b`: at the inner solution, one adjoint variable."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, PyTree

from .._inner._base import Counts, InnerSolution
from .._raise import or_fail
from .._results import RESULTS
from .._tree import stop_gradient, tree_zeros_like
from ._base import AbstractHypergradient, Estimate, HypergradientState, Query, as_stats
from ._point import Point, point


class Solved(NamedTuple):
    """Where the inner solve ended, and the problem there."""

    inner: InnerSolution
    inner_state: PyTree  # the inner solver's, for the next solve
    at: Point


class Adjoint(NamedTuple):
    """What a rule found at a point."""

    grad: PyTree[Array]
    v: PyTree[Array] | None
    results: tuple[RESULTS, ...]
    counts: Counts  # beyond the inner solve
    num_steps: Any
    evidence: dict[str, Any]  # fields of `Estimate`
    memory: tuple[PyTree, ...] = ()  # of `HypergradientState`, from `linear` on
    preconditioner: Callable[[PyTree], PyTree] | None = None

    def with_evidence(
        self, evidence: dict[str, Any], counts: Counts, num_steps: Any = 0
    ) -> "Adjoint":
        """The same with more `evidence`, and what that took."""
        return self._replace(
            evidence={**self.evidence, **evidence},
            counts=self.counts + counts,
            num_steps=self.num_steps + num_steps,
        )


class AbstractAtSolution(AbstractHypergradient):
    """A rule that takes the derivative of `x*` at the inner solution, however it was found."""

    @property
    def differentiates_start(self) -> bool:
        return False

    def init(self, query: Query) -> HypergradientState:
        x = query.start
        return HypergradientState(x, tree_zeros_like(x), query.inner_state)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        # 1. x solves the inner problem
        inner, inner_state = _solve(query, state.inner)
        solved = Solved(inner, inner_state, point(query.problem, inner.x, query.theta))
        # 2. v, and the hypergradient with it
        found = self.adjoint(query, solved, state)
        # 3. evidence, where it was asked for
        solved, found = self.with_evidence(query, solved, found)
        estimate = _estimate_at(solved.at, solved.inner, found, self.inner_result(inner.result))
        v = state.v if estimate.v is None else estimate.v
        return estimate, HypergradientState(estimate.x, v, inner_state, *found.memory)

    @abc.abstractmethod
    def adjoint(self, query: Query, solved: Solved, state: HypergradientState) -> Adjoint:
        """`v`, the hypergradient with it, and what is known of both."""

    def with_evidence(self, query: Query, solved: Solved, found: Adjoint) -> tuple[Solved, Adjoint]:
        """What was found, with what else is known of it."""
        del query
        return solved, found

    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        fixed = stop_gradient(query._replace(x0=query.start))
        state = fixed.inner_solver.init(fixed.condition, fixed.x0, fixed.theta)
        inner, inner_state = _solve(fixed, state)
        result = self.inner_result(inner.result)
        x = or_fail(inner.x, result, True) if throw else inner.x
        failed = None if throw else (result != RESULTS.successful)
        x = self.attach(query._replace(x0=fixed.x0), x, inner_state, throw, failed)
        return x if throw else or_fail(x, result, False)

    @abc.abstractmethod
    def attach(
        self,
        query: Query,
        x: PyTree[Array],
        inner_state: PyTree,
        throw: bool,
        failed: Bool[Array, ""] | None,
    ) -> PyTree[Array]:
        """The solution `x`, found from `query.x0`, with its derivative in theta and the condition.

        NaN where `failed`; with `throw` the derivative raises where it cannot be had.
        """

    def inner_result(self, result: RESULTS) -> RESULTS:
        """What the outcome of the inner solve means to this rule: here, only that x is a number."""
        return RESULTS.where(result == RESULTS.nonfinite, result, RESULTS.successful)


def _solve(query: Query, state: PyTree) -> tuple[InnerSolution, PyTree]:
    return query.inner_solver.solve(query.condition, query.start, query.theta, state)


def _estimate_at(at: Point, inner: InnerSolution, found: Adjoint, *results: RESULTS) -> Estimate:
    """The estimate of what a rule found."""
    evidence = {} if found.v is None else {"dual_value": at.dual_value(found.v)}
    return Estimate.of(
        at.value,
        found.grad,
        *results,
        *found.results,
        aux=at.aux,
        x=inner.x,
        v=found.v,
        inner_residual=inner.residual,
        stats=as_stats(inner.counts + found.counts, inner.num_steps, found.num_steps),
        **evidence,
        **found.evidence,
    )
