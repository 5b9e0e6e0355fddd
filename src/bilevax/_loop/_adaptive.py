"""A loop that is differentiated back to where it no longer matters."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._tree import signs_like, tree_norm, tree_sub, tree_zeros_like, unbounded
from ._explicit import State, WayBack, repeat_with_way_back
from ._loops import has_loops
from ._probe import Probe, add_tap

# Quarters of a short run need at least this many pieces.
_FEWEST_SEGMENTS = 8


def repeat_until_negligible(
    step: Callable[[PyTree], PyTree],
    is_done: Callable[[PyTree], Array | bool],
    carry: tuple,
    max_steps: int,
    rtol: float,
    probe: Probe | None,
) -> tuple[tuple, Int[Array, ""]]:
    """`step` until `is_done`; on the way back only as many steps as matter.

    The way back goes over segments of about `sqrt(max_steps)` steps. It ends where the
    adjoint of x has fallen to `rtol` of what it was at the end, and the contributions of the
    segments, extrapolated as a geometric series, have no more than `rtol` of the sum to add.

    A truncation is only as good as the derivatives of the steps. So the way forward also
    carries the tangent of x along one direction, and looks how its increments
    `d_k = ||J_{k+1} u - J_k u||` fall: if they are no smaller in the last quarter of the
    steps than in the third, the error of the Jacobian still grows.

    Returns the last carry and the number of steps.
    """
    if has_loops(step, carry):
        raise TypeError(
            'bx.Truncated("auto") takes a tangent and an adjoint through every step, and these '
            "steps contain a loop of unknown length (a line search, a linear solve), which JAX "
            "differentiates in one mode only. Use bx.Unrolled() or bx.Truncated(num_steps)."
        )
    num_segments = max(math.ceil(math.sqrt(max_steps)), min(max_steps, _FEWEST_SEGMENTS))
    per_segment = math.ceil(max_steps / num_segments)

    def counted(state: tuple) -> tuple:
        *carry, count, _ = state
        new = step(tuple(carry))
        return *new, count + 1, jnp.asarray(is_done(new))

    def is_running(state: State) -> Bool[Array, ""]:
        *_, count, done = state[1]
        return (count < max_steps) & ~done

    def run(apply: Callable[[State], State], state: State) -> State:
        return jax.lax.while_loop(is_running, apply, state)

    def forward(steps: WayBack, state: State) -> tuple[State, "_Kept"]:
        direction = jtu.tree_map(signs_like, steps.moving)

        def take_step(s: tuple) -> tuple:
            state, tangent, largest = s
            new, new_tangent = steps.push_forward(state, tangent, direction)
            increment = tree_norm(tree_sub(new_tangent[0], tangent[0]))
            return new, new_tangent, jnp.maximum(largest, increment)

        def segment(s: tuple, _: None) -> tuple:
            start, tangent = s
            end = jnp.minimum(start[1][-2] + per_segment, max_steps)
            zero = jnp.zeros_like(tree_norm(tangent[0]))
            state, tangent, largest = jax.lax.while_loop(
                lambda s: is_running(s[0]) & (s[0][1][-2] < end),
                take_step,
                (start, tangent, zero),
            )
            return (state, tangent), (start, largest)

        begin = (state, tree_zeros_like(state[0]))
        (final, tangent), (starts, largest) = jax.lax.scan(segment, begin, length=num_segments)
        counts = jnp.append(starts[1][-2], final[1][-2])
        error, is_growing = _jacobian_error(largest, counts, tree_norm(tangent[0]), rtol)
        return final, _Kept(starts, counts, error, is_growing)

    def backward(
        steps: WayBack, kept: "_Kept", adjoint: PyTree, probe: Probe | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        final = _go_back(steps, kept, adjoint, per_segment, rtol, tree_zeros_like(probe))
        # What lies before the truncation is taken as a constant.
        evidence = final.evidence
        if evidence is not None:
            evidence = evidence._replace(
                num_back=(kept.counts[-1] - kept.counts[final.segment]).astype(
                    final.remainder.dtype
                ),
                remainder=final.remainder,
                jacobian_error=kept.jacobian_error,
                is_growing=kept.is_growing.astype(final.remainder.dtype),
            )
        return final.total, tree_zeros_like(final.adjoint), evidence

    start = (*carry, jnp.asarray(0, jnp.int32), jnp.asarray(is_done(carry)))
    final = repeat_with_way_back(counted, start, run, forward, backward, probe)
    return final[:-2], final[-2]


class _Kept(NamedTuple):
    """What is kept for the way back."""

    starts: State  # of the segments
    counts: Int[Array, "num_segments_and_1"]  # steps taken before each, and in all
    jacobian_error: Scalar
    is_growing: Bool[Array, ""]


class _WayBackState(NamedTuple):
    segment: Int[Array, ""]  # the last that was differentiated
    adjoint: PyTree[Array]
    total: PyTree[Array]
    contribution: Scalar  # of the last segment, its norm
    remainder: Scalar  # of all before it, extrapolated
    evidence: Probe | None


def _go_back(
    steps: WayBack,
    kept: _Kept,
    adjoint: PyTree,
    per_segment: int,
    rtol: float,
    evidence: Probe | None,
) -> _WayBackState:
    end_norm = tree_norm(adjoint[0])

    def is_needed(state: _WayBackState) -> Bool[Array, ""]:
        has_faded = tree_norm(state.adjoint[0]) <= rtol * end_norm
        is_small = state.remainder <= rtol * tree_norm(state.total)
        return (kept.counts[state.segment] > 0) & ~(has_faded & is_small)

    def differentiate(state: _WayBackState) -> _WayBackState:
        segment = state.segment - 1
        length = kept.counts[segment + 1] - kept.counts[segment]
        start = jtu.tree_map(lambda a: a[segment], kept.starts)
        _, states = jax.lax.scan(lambda s, _: (steps.apply(s), s), start, length=per_segment)

        def step_back(k: Array, s: tuple) -> tuple:
            adjoint, total = s
            state = jtu.tree_map(lambda a: a[length - 1 - k], states)
            of_moving, adjoint = steps.pull_back(state, adjoint)
            return adjoint, jtu.tree_map(jnp.add, total, of_moving)

        adjoint, added = jax.lax.fori_loop(
            0, length, step_back, (state.adjoint, tree_zeros_like(steps.moving))
        )
        contribution = tree_norm(added)
        ratio = contribution / jnp.where(state.contribution > 0, state.contribution, 1)
        # no ratio from the first segment, and no series from one that does not fall
        is_known = (state.contribution > 0) & (ratio < 1)
        series = contribution * ratio / jnp.where(is_known, 1 - ratio, 1)
        total = jtu.tree_map(jnp.add, state.total, added)
        # Contributions of steps that oscillate may be small by chance. So may the adjoint.
        faded = tree_norm(adjoint[0]) / jnp.where(end_norm > 0, end_norm, 1)
        series = jnp.maximum(series, faded * tree_norm(total))
        series = jnp.where(is_known, series, unbounded(series))
        evidence = state.evidence
        return _WayBackState(
            segment=segment,
            adjoint=adjoint,
            total=total,
            contribution=contribution,
            remainder=jnp.where(kept.counts[segment] == 0, 0, series),
            evidence=None if evidence is None else add_tap(evidence, adjoint[0]),
        )

    start = _WayBackState(
        segment=jnp.sum(kept.counts[1:] > kept.counts[:-1]).astype(jnp.int32),
        adjoint=adjoint,
        total=tree_zeros_like(steps.moving),
        contribution=jnp.zeros_like(end_norm),
        remainder=unbounded(end_norm),
        evidence=evidence,
    )
    return jax.lax.while_loop(is_needed, differentiate, start)


def _jacobian_error(
    largest: Array, counts: Array, norm: Scalar, rtol: float
) -> tuple[Scalar, Bool[Array, ""]]:
    """The relative error of the Jacobian after all steps, and whether it still grows.

    `largest`: of the increments of each segment. From the third quarter of the steps to the
    last they fall by a factor, which is extrapolated.
    """
    num_steps = counts[-1]
    is_used = counts[1:] > counts[:-1]
    middle = counts[1:] + counts[:-1]  # twice the middle of each segment
    in_last = is_used & (2 * middle >= 3 * num_steps)
    in_third = is_used & (middle >= num_steps) & ~in_last
    in_third = jnp.where(jnp.any(in_third), in_third, is_used & ~in_last)  # few segments
    third = jnp.max(jnp.where(in_third, largest, 0))
    last = jnp.max(jnp.where(in_last, largest, 0))
    per_quarter = jnp.maximum(num_steps, 4).astype(last.dtype) / 4
    scale = jnp.where(norm > 0, norm, 1)
    is_relevant = last * per_quarter > rtol * scale
    is_growing = is_relevant & ~(last < third)
    # the largest of a quarter stands at its beginning, and the sum starts after its end
    fall = last / jnp.where(third > 0, third, 1)
    rate = fall ** (1 / per_quarter)
    error = last * fall / jnp.where(rate < 1, 1 - rate, 1) / scale
    # rounding errors do not fall
    error = jnp.where(is_relevant, error, jnp.minimum(error, rtol))
    return jnp.where(is_growing, unbounded(error), error), is_growing
