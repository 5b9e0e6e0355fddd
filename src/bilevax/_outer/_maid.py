"""MAID: accuracy and step size that adapt to each other."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._hypergradient._base import AbstractHypergradient, Estimate, HypergradientState, Query
from .._hypergradient.implicit._implicit import Implicit
from .._inner._default import as_inner_solver
from .._problem import Bilevel, start_at, strong_convexity
from .._results import RESULTS
from .._tree import (
    is_bounded,
    largest_entry,
    tree_all_finite,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_sub,
    tree_where,
    tree_zeros_like,
    unbounded,
)
from ._base import AbstractMethod
from ._evaluation import Evaluation, Place
from ._fall_back import is_right
from ._line_search import check_step, gradient_noise, value_noise
from ._tolerances import at_tolerances

_ACCURACY = 0.5  # an error of half the hypergradient leaves a direction of descent
_ARMIJO = 0.1  # a long step onto a flat tail decreases too little for its length
_TIGHTEN = 0.2
_LOOSEN = 1.5
_SHORTEN = 0.5
_CHANGE = 10.0  # of the step, from one outer step to the next
_SLACK = 0.1
_LOOSEST = 0.1
_MAX_TRIALS = 6  # of a line search, before the accuracy is doubted
_MAX_EVALUATIONS = 60  # of one step
_MAX_FAILURES = 3  # steps in a row


class MAID(AbstractMethod):
    """Gradient descent whose accuracy and step size adapt: nothing to tune.

    `theta <- theta - t h` with the hypergradient `h` to tolerances that are tightened until

        error <= ||h|| / 2,    so that -h is a direction of descent,

    and a step `t` by backtracking, until the value falls even if both values are wrong by
    as much as they may be:

        F(theta - t h) + noise <= F(theta) - noise - 0.1 t ||h||^2.

    `F` is the dual value `L - v' grad_x U`, accurate to second order in the error of x.
    Where only the noise decides, the tolerances were too loose and are tightened; where all
    was clear by far, they are loosened again. After a success the next step is the inverse
    curvature along the last.

    **Arguments:**

    - `inner_solver`: as in `bx.hypergradient`; one whose accuracy can be chosen.
    - `hypergradient`: `bx.Implicit(linear_solver, preconditioner)`, or `bx.Polished`.
    - `step_size`: the first `t`.
    - `tolerance`: the first relative tolerance of the inner solve and the adjoint system.
    - `max_step`: no entry of theta moves by more at once; see `OuterLBFGS`.
    - `certified`: take for the error not the `error_estimate`, but the `error_bound`, which
        needs `Minimum(..., strong_convexity=...)`. Much more is then solved than needed.

    A step that is flagged does not move theta; three in a row end the run. It stops by
    itself ("optimizer") where a step promises no decrease that this dtype could show.

    **Cost:** for each outer step at least one inner solve, hypergradient and error
    estimate; more where the accuracy or the step has to be found.

    **Exact when** the tolerances may go to zero: it converges to a stationary point, from
    any first step and tolerance.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.5) ** 2),
        )
        bx.solve(problem, jnp.zeros(3), -jnp.ones(3), bx.MAID(), num_steps=20)
        ```

    Reference: Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order
    method for bilevel optimization with application to hyperparameter learning", 2024,
    arXiv:2308.10098, algorithm 3.1; here with an estimate for the bound and the dual value
    for the value.
    """

    inner_solver: Any
    hypergradient: AbstractHypergradient
    step_size: float | Scalar
    tolerance: float | Scalar
    max_step: float | Scalar
    certified: bool

    def __init__(
        self,
        inner_solver: Any = None,
        hypergradient: AbstractHypergradient | None = None,
        *,
        step_size: float | Scalar = 1.0,
        tolerance: float | Scalar = 1e-1,
        max_step: float | Scalar = 1.0,
        certified: bool = False,
    ) -> None:
        rule = Implicit() if hypergradient is None else hypergradient
        told = rule.with_error_estimate(not certified)
        if told is None:
            raise TypeError(
                "MAID chooses the tolerances of bx.Implicit() by the errors that it estimates; got "
                f"{type(rule).__name__}."
            )
        for name, value in (("step_size", step_size), ("tolerance", tolerance)):
            if isinstance(value, int | float) and not 0 < value < float("inf"):
                raise ValueError(f"MAID({name}=...) must be positive and finite; got {value}.")
        check_step("MAID", max_step)
        self.inner_solver = inner_solver
        self.hypergradient = told
        self.step_size = step_size
        self.tolerance = tolerance
        self.max_step = max_step
        self.certified = certified

    def init(self, problem: Bilevel, x0: PyTree, theta: PyTree) -> "MAIDState":
        if self.certified and strong_convexity(problem.inner, theta) is None:
            raise TypeError(
                "MAID(certified=True) needs the modulus of strong convexity of the inner "
                "objective: bx.Minimum(fn, strong_convexity=...)."
            )
        x = start_at(x0, theta)
        tolerance = jnp.minimum(jnp.asarray(self.tolerance, tree_dtype(x)), _LOOSEST)
        solver, rule = self._parts(problem, x, tolerance)
        query = Query(problem, solver, x, theta)
        warm = rule.init(query)
        struct = eqx.filter_eval_shape(rule.estimate, query, warm)[0]
        shapes, texts = eqx.partition(struct, lambda s: isinstance(s, jax.ShapeDtypeStruct))
        known = jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return MAIDState(
            theta=theta,
            x=x,
            known=known,
            is_known=jnp.array(False),
            warm=warm,
            step_size=jnp.asarray(self.step_size, tree_dtype(theta)),
            is_calibrated=jnp.array(False),
            tolerance=tolerance,
            scale=jnp.zeros_like(known.best_value),
            num_failures=jnp.asarray(0, jnp.int32),
            stats=known.stats,
            texts=texts.aux,
        )

    def evaluate(
        self, problem: Bilevel, x0: PyTree, state: "MAIDState", is_last: Bool[Array, ""]
    ) -> tuple[Evaluation, "MAIDState"]:
        """The hypergradient at theta, until it is accurate."""
        del x0
        carry = self._search(problem, state, lambda carry: ~carry.is_known)
        seen = carry.seen
        # A value that has become small may still be a difference of large ones.
        scale = jnp.maximum(state.scale, jnp.abs(seen.best_value))
        is_done = self._is_idle(seen, carry, scale)
        # A step from here was tried, and found nothing.
        is_stuck = ~is_last & (state.num_failures > 0)
        is_lost = (~carry.is_known | is_stuck) & ~is_done
        good = is_right(seen)
        new_state = dataclasses.replace(
            carry.after(state), x=seen.x, scale=scale, stats=tree_zeros_like(state.stats)
        )
        evaluation = Evaluation.of(
            seen,
            state.theta,
            usable=good & ~is_lost,
            is_function=True,
            place=Place(state.theta, seen.x, eqx.combine(seen.aux, state.texts)),
            error_estimate=self._error(seen),
            result=RESULTS.where(is_lost & good, RESULTS.inaccurate, seen.result),
            stats=carry.stats,
            should_stop=is_done & ~is_last,
            gave_up=state.num_failures >= _MAX_FAILURES,
        )
        return evaluation, new_state

    def step(self, problem: Bilevel, state: "MAIDState", seen: Evaluation) -> "MAIDState":
        """Trials along `-h`, and `h` again where the accuracy is to blame."""
        del seen
        carry = self._search(problem, state, lambda carry: state.is_known & ~carry.has_moved)
        is_done = ~carry.has_moved & self._is_idle(carry.seen, carry, state.scale)
        num_failures = jnp.where(carry.has_moved | is_done, 0, state.num_failures + 1)
        return dataclasses.replace(
            carry.after(state),
            theta=tree_where(carry.has_moved, carry.point, state.theta),
            num_failures=num_failures.astype(jnp.int32),
        )

    def _search(
        self, problem: Bilevel, state: "MAIDState", wants_more: Callable[["_Carry"], Array]
    ) -> "_Carry":
        """One evaluation a pass, as long as it is wanted and promises something."""

        def evaluate(carry: _Carry) -> _Carry:
            solver, rule = self._parts(problem, state.x, carry.tolerance)
            start, warm = carry.warm.x, carry.warm
            estimate, warm = rule.estimate(Query(problem, solver, start, carry.point), warm)
            estimate = eqx.filter(estimate, eqx.is_array)
            warm = tree_where(tree_all_finite(warm), warm, carry.warm)
            return self._judge(state, carry, estimate, warm)

        def is_running(carry: _Carry) -> Bool[Array, ""]:
            is_open = (carry.num_evaluations < _MAX_EVALUATIONS) & ~carry.is_over
            size = jnp.abs(carry.known.best_value)
            is_idle = carry.is_known & ~self._is_worthwhile(carry.known, carry, size)
            return wants_more(carry) & is_open & ~is_idle

        return jax.lax.while_loop(is_running, evaluate, self._try(state.theta, _Carry.start(state)))

    def _is_idle(self, known: Estimate, carry: "_Carry", scale: Scalar) -> Bool[Array, ""]:
        return ~self._is_worthwhile(known, carry, scale) & tree_all_finite(known.grad)

    def _parts(self, problem: Bilevel, x: PyTree, tolerance: Scalar) -> Any:
        solver = as_inner_solver(self.inner_solver, problem.inner, x)
        return at_tolerances(solver, self.hypergradient, problem.inner, x, (tolerance, tolerance))

    def _error(self, estimate: Estimate) -> Scalar:
        error = estimate.error_bound if self.certified else estimate.error_estimate
        assert error is not None  # `init` has asked for it
        return error

    def _is_accurate(self, estimate: Estimate) -> Bool[Array, ""]:
        norm = tree_norm(estimate.grad)
        return is_right(estimate) & (self._error(estimate).astype(norm.dtype) <= _ACCURACY * norm)

    def _has_slack(self, estimate: Estimate) -> Bool[Array, ""]:
        norm = tree_norm(estimate.grad)
        return self._error(estimate).astype(norm.dtype) <= _SLACK * _ACCURACY * norm

    def _length(self, grad: PyTree, step_size: Scalar) -> Scalar:
        """The step, no longer than allowed."""
        longest = largest_entry(grad).astype(step_size.dtype)
        limit = jnp.asarray(self.max_step, step_size.dtype) / jnp.where(longest > 0, longest, 1)
        return jnp.minimum(step_size, limit)

    def _is_worthwhile(self, estimate: Estimate, carry: "_Carry", scale: Scalar) -> Bool[Array, ""]:
        """Whether a step promises a decrease that could be seen in a value of size `scale`."""
        # A first step that was never tried says nothing of the problem.
        step_size = carry.step_size
        step_size = jnp.where(carry.is_calibrated, step_size, unbounded(step_size))
        length = self._length(estimate.grad, step_size)
        norm = tree_norm(estimate.grad)
        error = self._error(estimate).astype(norm.dtype)
        # An error hides a hypergradient of its own size.
        norm = jnp.maximum(norm, jnp.where(is_bounded(error), error, norm))
        gain = (length.astype(norm.dtype) * norm**2).astype(scale.dtype)
        return ~(gain <= 1e3 * jnp.finfo(gain.dtype).eps * scale)

    def _try(self, theta: PyTree, carry: "_Carry") -> "_Carry":
        """The next point: theta itself until its hypergradient is accurate, then a trial."""
        trial = tree_axpy(-self._length(carry.known.grad, carry.step_size), carry.known.grad, theta)
        return carry._replace(point=tree_where(carry.is_known, trial, theta))

    def _judge(
        self, state: "MAIDState", carry: "_Carry", new: Estimate, warm: HypergradientState
    ) -> "_Carry":
        """What an evaluation means, and where the next one is."""
        was_trial, known = carry.is_known, carry.known
        accurate = self._is_accurate(new)
        # 1. a trial: Armijo, with the noise of both values against it
        length = self._length(known.grad, carry.step_size)
        norm = tree_norm(known.grad)
        change = new.best_value - known.best_value
        noise = value_noise(new) + value_noise(known)
        goal = -_ARMIJO * (length.astype(norm.dtype) * norm**2).astype(change.dtype)
        usable = is_right(new)
        accept = was_trial & usable & (change + noise <= goal)
        # 2. what is to blame: the step, or, if it may be good, the accuracy
        is_hidden = usable & (change - noise <= goal)
        too_long = was_trial & ~accept & ~is_hidden
        num_trials = jnp.where(too_long, carry.num_trials + 1, 0)
        is_exhausted = num_trials >= _MAX_TRIALS
        blind = is_exhausted | (was_trial & ~accept & is_hidden)
        too_loose = blind | (~accurate & (accept | ~was_trial))
        floor = 10 * jnp.finfo(carry.tolerance.dtype).eps
        tighter = jnp.maximum(_TIGHTEN * carry.tolerance, floor)
        is_easy = accept & accurate & self._has_slack(new) & (noise <= -_SLACK * change)
        looser = jnp.minimum(_LOOSEN * carry.tolerance, _LOOSEST)
        kept = jnp.where(is_easy, looser, carry.tolerance)
        counts = jtu.tree_map(jnp.add, carry.stats, new.stats)
        seen = tree_where(was_trial, known, new)  # what is known of theta
        after = _Carry(
            point=carry.point,
            known=tree_where(accept, new, seen),
            seen=seen,
            # An accepted trial is the theta of the next step: its accuracy is judged there.
            is_known=jnp.where(was_trial, ~blind, True) & (accurate | (was_trial & ~accept)),
            has_moved=accept,
            warm=warm,
            step_size=jnp.where(
                accept,
                _next_step(known, new, length),
                jnp.where(too_long, _SHORTEN * length, carry.step_size),
            ).astype(carry.step_size.dtype),
            is_calibrated=carry.is_calibrated | accept,
            tolerance=jnp.where(too_loose, tighter, kept),
            num_trials=jnp.where(is_exhausted, 0, num_trials).astype(jnp.int32),
            num_evaluations=carry.num_evaluations + 1,
            is_over=too_loose & ~accept & (carry.tolerance <= floor),
            stats=counts,
        )
        return tree_where(accept, after, self._try(state.theta, after))


def _next_step(old: Estimate, new: Estimate, length: Scalar) -> Scalar:
    """The inverse curvature along the last step, where that is known to be positive.

    Barzilai and Borwein, "Two-point step size gradient methods", 1988, equation (5).
    """
    change = tree_sub(new.grad, old.grad)
    norm_sq = tree_dot(old.grad, old.grad)
    curvature = -tree_dot(old.grad, change) / jnp.where(norm_sq > 0, norm_sq, 1)  # t s'y / s's
    doubt = (gradient_noise(old) + gradient_noise(new)) / jnp.sqrt(
        jnp.where(norm_sq > 0, norm_sq, 1)
    )
    is_convex = curvature > doubt
    factor = jnp.where(is_convex, 1 / jnp.where(is_convex, curvature, 1), 2)
    return length * jnp.clip(factor, 1 / _CHANGE, _CHANGE).astype(length.dtype)


class MAIDState(eqx.Module):
    """What the next evaluation and the next step need."""

    theta: PyTree[Array]
    x: PyTree[Array]
    known: Estimate  # the last one at theta
    is_known: Bool[Array, ""]  # it is accurate
    warm: HypergradientState
    step_size: Scalar
    is_calibrated: Bool[Array, ""]  # the step was measured, and is not the user's
    tolerance: Scalar
    scale: Scalar  # the largest value so far
    num_failures: Int[Array, ""]  # steps in a row
    stats: dict[str, Array]  # of the steps since the last evaluation
    texts: PyTree  # what is no array in `aux`


class _Carry(NamedTuple):
    """The search for one step."""

    point: PyTree[Array]  # of the next evaluation
    known: Estimate  # at theta; after an accepted trial, there
    seen: Estimate  # at theta
    is_known: Bool[Array, ""]
    has_moved: Bool[Array, ""]
    warm: HypergradientState
    step_size: Scalar
    is_calibrated: Bool[Array, ""]
    tolerance: Scalar
    num_trials: Int[Array, ""]
    num_evaluations: Int[Array, ""]
    is_over: Bool[Array, ""]
    stats: dict[str, Array]

    @staticmethod
    def start(state: MAIDState) -> "_Carry":
        no, count = jnp.array(False), jnp.asarray(0, jnp.int32)
        return _Carry(
            point=state.theta,
            known=state.known,
            seen=state.known,
            is_known=state.is_known,
            has_moved=no,
            warm=state.warm,
            step_size=state.step_size,
            is_calibrated=state.is_calibrated,
            tolerance=state.tolerance,
            num_trials=count,
            num_evaluations=count,
            is_over=no,
            stats=state.stats,
        )

    def after(self, state: MAIDState) -> MAIDState:
        """`state` with what the search has found out."""
        return dataclasses.replace(
            state,
            known=self.known,
            is_known=self.is_known,
            warm=self.warm,
            step_size=self.step_size,
            is_calibrated=self.is_calibrated,
            tolerance=self.tolerance,
            stats=self.stats,
        )
