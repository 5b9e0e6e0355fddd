"""What the rules share that differentiate `x` as a function of theta, through steps."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver, Counts
from ..._loop._loops import differentiable_loops
from ..._loop._probe import Probe, growth, largest_growth, new_probe, tap_end
from ..._loop._scan import Checkpoints, repeat
from ..._problem import AbstractCondition, start_at
from ..._raise import or_fail
from ..._results import RESULTS
from ..._tree import tree_dtype
from .._base import (
    AbstractHypergradient,
    Estimate,
    HypergradientState,
    Query,
    as_stats,
    finite_or_not,
)
from ._agreement import LARGEST_ERROR, convergence, judged
from ._watched import Steps, residual_of, watched

# x, the solver's state for the next solve, the steps taken, the steps differentiated
Unrolling = tuple[PyTree, PyTree, Array, Array]
# what a rule knows better: an outcome, the error of its estimate, what that took
Own = tuple[RESULTS, Array, Counts]


class AbstractThroughSteps(AbstractHypergradient):
    """A rule that differentiates the steps of the inner solver.

    Law: `unroll` returns the `x` of the inner solver's own steps, differentiable in theta
    and the arrays of `condition` as the rule says.
    """

    needs_steps: ClassVar[bool] = True

    @abc.abstractmethod
    def unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
        probe: Probe | None = None,
    ) -> Unrolling:
        """`x` as a differentiable function of theta. `probe`: see `_probe.py`."""

    def init(self, query: Query) -> HypergradientState:
        self._check_stepping(query.inner_solver)
        return HypergradientState(x=query.start, v=None, inner=query.inner_state)

    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        stepping = self._check_stepping(query.inner_solver)

        def run(args: tuple) -> tuple[PyTree, None]:
            condition, x0, theta = args
            state = stepping.init(condition, start_at(x0, theta), theta)
            return self.unroll(condition, stepping, x0, theta, state)[0], None

        args = (query.condition, query.x0, query.theta)
        steps = Steps(run, residual_of, query.condition.is_symmetric, stepping)
        x, _ = watched(steps, args, query.start, throw, self._largest_error)
        return or_fail(x, finite_or_not(x), throw) if throw else x

    @property
    def _largest_error(self) -> float:
        """A derivative wrong by more, relative to its size, is not that of the solution."""
        return LARGEST_ERROR

    def _check_stepping(self, inner_solver: AbstractInnerSolver) -> AbstractSteppingSolver:
        if not isinstance(inner_solver, AbstractSteppingSolver):
            raise TypeError(
                f"`{type(self).__name__}` differentiates the steps of the inner solver, and "
                f"{type(inner_solver).__name__} has none that JAX can see. Use bx.Implicit(), or "
                "an inner solver such as bx.Descent(optimizer, num_steps=...)."
            )
        return inner_solver


def estimate_through(
    unroll: Callable[..., Unrolling],
    query: Query,
    state: HypergradientState,
    max_growth: float | None,
    largest_error: float = LARGEST_ERROR,
    own: Callable[[Probe, PyTree, Array], Own] | None = None,
) -> tuple[Estimate, HypergradientState]:
    """The estimate of a rule that differentiates `x` as a function of theta.

    An adjoint that grew on the way back by more than `max_growth` (by default what the
    precision allows) is flagged. `own` makes of what was seen there, of the hypergradient and of
    the number of steps what the rule knows better.
    """
    problem, inner_solver, x0, theta = query
    dtype = tree_dtype(query.start)

    def truncated_problem(theta: PyTree, probe: Probe) -> tuple[Array, Any]:
        x, inner_state, num_steps, num_back = unroll(
            problem.inner, inner_solver, x0, theta, state.inner, probe
        )
        value, aux = problem.outer_value(tap_end(x, probe), theta)
        return value, (aux, x, inner_state, num_steps, num_back)

    differentiate = jax.value_and_grad(truncated_problem, (0, 1), has_aux=True)
    (value, rest), (grad, seen) = differentiate(theta, new_probe(dtype))
    aux, x, inner_state, num_steps, num_back = rest
    at = convergence(problem.inner, inner_solver, x, query.start, theta, num_steps)
    adjoint_growth = growth(seen)
    has_exploded = adjoint_growth > largest_growth(max_growth, dtype)
    exploded = RESULTS.where(has_exploded, RESULTS.exploding, RESULTS.successful)
    # "exploding" before "nonfinite": an adjoint that overflows has exploded first
    results = [exploded, finite_or_not((value, grad))]
    # Going back through a step recomputes it (one gradient) and transposes its derivative.
    counts = Counts(gradients=num_steps + num_back + 2, hessian=num_back, cross=num_back)
    found = judged(problem, x, theta, grad, at, largest_error)
    evidence = {"adjoint_growth": adjoint_growth, **found.evidence}
    if own is not None:
        result, evidence["error_estimate"], counts = own(seen, grad, num_steps)
        results.append(result)
    results.append(found.result)
    stats = as_stats(counts, num_steps, 0)
    estimate = Estimate.of(value, grad, *results, aux=aux, x=x, stats=stats, **evidence)
    return estimate, HypergradientState(x=x, v=None, inner=inner_state)


def repeat_until_done(
    solver: AbstractSteppingSolver,
    step: Callable[[PyTree], PyTree],
    carry: PyTree,
    length: int,
    checkpoints: Checkpoints,
    probe: Probe | None = None,
) -> tuple[PyTree, Array]:
    """`length` steps of a scan; those after the solver is done change nothing."""
    step = differentiable_loops(step, carry)
    if solver.is_fixed_length:
        return repeat(step, carry, length, checkpoints, probe), jnp.asarray(length, jnp.int32)

    def guarded(state: tuple) -> tuple:
        *carry, count = state
        # A cond and not a where: the step of a converged solver may be 0/0, and its
        # derivative would be NaN through a where.
        return jax.lax.cond(
            solver.is_done(tuple(carry)), lambda: state, lambda: (*step(tuple(carry)), count + 1)
        )

    start = (*carry, jnp.asarray(0, jnp.int32))
    *carry, count = repeat(guarded, start, length, checkpoints, probe)
    return tuple(carry), count
