"""A loop of known length that is differentiated from a given number of kept carries."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._tree import tree_zeros_like
from ._explicit import State, WayBack, repeat_with_way_back
from ._probe import Probe, add_tap


def repeat_from_checkpoints(
    step: Callable[[PyTree], PyTree],
    carry: PyTree[Array],
    length: int,
    num_checkpoints: int,
    probe: Probe | None,
) -> PyTree[Array]:
    """`step` applied `length` times, keeping `num_checkpoints` carries for the way back.

    The least recomputation that so many carries allow: no step is taken more than r times
    again, r the smallest number with `binom(num_checkpoints + r, r) >= length`. The way back is
    one loop over a stack of carries, so that the program does not grow with `length`.

    Reverse mode, and forward mode over it; not forward mode alone. `probe`: see `_probe.py`.

    Reference: Griewank, Walther, "Algorithm 799: revolve", 2000, section 2.
    """
    reach = _reach_table(length, num_checkpoints)
    places = _first_places(reach, length, num_checkpoints)

    def run(apply: Callable, state: State) -> State:
        return _advance(apply, state, length)

    def forward(steps: WayBack, state: State) -> tuple[State, PyTree]:
        lengths = jnp.asarray(np.diff([*places, length]), jnp.int32)
        return jax.lax.scan(lambda s, n: (_advance(steps.apply, s, n), s), state, lengths)

    def backward(
        steps: WayBack, kept: PyTree, adjoint: PyTree, probe: Probe | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        start = _Unwinding(
            kept=jtu.tree_map(partial(_with_room, num_checkpoints), kept),
            places=_with_room(num_checkpoints, jnp.asarray(places, jnp.int32)),
            top=jnp.asarray(len(places) - 1, jnp.int32),
            end=jnp.asarray(length, jnp.int32),
            adjoint=adjoint,
            total=tree_zeros_like(steps.moving),
            evidence=tree_zeros_like(probe),
        )
        final = _unwind(steps, reach, start)
        return final.total, final.adjoint, final.evidence

    return repeat_with_way_back(step, carry, run, forward, backward, probe)


class _Unwinding(NamedTuple):
    """The way back: a stack of kept carries, and the adjoint of the carry at step `end`."""

    kept: PyTree[Array]
    places: Int[Array, "num_checkpoints"]
    top: Int[Array, ""]
    end: Int[Array, ""]
    adjoint: PyTree[Array]
    total: PyTree[Array]  # the adjoint of theta, so far
    evidence: Probe | None


def _unwind(steps: WayBack, reach: np.ndarray, start: _Unwinding) -> _Unwinding:
    """All the way back."""
    num_checkpoints = reach.shape[0] - 1

    def ahead(state: _Unwinding) -> tuple[Array, Array]:
        """Where the last kept carry is, and how far to go from it."""
        place = state.places[state.top]
        room = num_checkpoints - 1 - state.top
        return place, _steps_ahead(reach, state.end - place, room)

    def go_ahead(state: _Unwinding, num_steps: Array) -> PyTree:
        kept = jtu.tree_map(lambda a: a[state.top], state.kept)
        return _advance(steps.apply, kept, num_steps)

    def is_far(state: _Unwinding) -> Array:
        place, num_steps = ahead(state)
        return place + num_steps < state.end - 1

    def keep(state: _Unwinding) -> _Unwinding:
        """Keep another carry, nearer to the end."""
        place, num_steps = ahead(state)
        carry, top = go_ahead(state, num_steps), state.top + 1
        kept = jtu.tree_map(lambda a, c: a.at[top].set(c), state.kept, carry)
        places = state.places.at[top].set(place + num_steps)
        return state._replace(kept=kept, places=places, top=top)

    def transpose(state: _Unwinding) -> _Unwinding:
        """The last step before the end is transposed."""
        state = jax.lax.while_loop(is_far, keep, state)
        place, num_steps = ahead(state)
        carry = go_ahead(state, num_steps)
        of_moving, adjoint = steps.pull_back(carry, state.adjoint)
        end, evidence = state.end - 1, state.evidence
        if evidence is not None:
            evidence = add_tap(evidence, adjoint[0])
        return state._replace(
            top=jnp.where(place == end, state.top - 1, state.top),
            end=end,
            adjoint=adjoint,
            total=jtu.tree_map(jnp.add, state.total, of_moving),
            evidence=evidence,
        )

    return jax.lax.while_loop(lambda state: state.end > 0, transpose, start)


def _with_room(num_checkpoints: int, a: Array) -> Array:
    """`a` with a first axis of that length."""
    return jnp.pad(a, [(0, num_checkpoints - a.shape[0])] + [(0, 0)] * (a.ndim - 1))


def _advance(apply: Callable[[State], State], state: State, num_steps: Array | int) -> State:
    return jax.lax.fori_loop(0, num_steps, lambda _, s: apply(s), state)


# With c kept carries, the one at the start among them, and r passes over each step after
# the first, binom(c + r, c) steps can be taken back: `reach[c, r]`. The next carry is kept
# m steps ahead: m steps with c carries and a pass less lie before it, l - m steps with c - 1
# carries and r passes after it. The fewest steps in all are taken where both sides need
# the passes they are given, and no fewer.


def _reach_table(length: int, num_checkpoints: int) -> np.ndarray:
    """`reach[c, r]`, up to the r that `length` steps take, and no larger than `length`."""
    columns = [np.ones(num_checkpoints + 1, np.int64)]
    while columns[-1][num_checkpoints] < length:
        column = columns[-1].copy()
        for c in range(1, num_checkpoints + 1):  # Pascal's triangle
            column[c] = min(column[c - 1] + columns[-1][c], length)
        columns.append(column)
    return np.stack(columns, axis=1)


def _steps_ahead(reach: Any, length: Any, room: Any, xp: Any = jnp) -> Any:
    """How far to go from a kept carry, `length` steps before the end, `room` carries free."""
    reach = xp.asarray(reach, xp.int32)
    passes = xp.sum(reach[room + 1] < length, dtype=xp.int32)
    fewest = xp.where(passes >= 2, reach[room + 1, xp.maximum(passes - 2, 0)], 1)
    ahead = xp.maximum(length - reach[room, passes], fewest)
    return xp.where(room == 0, length - 1, xp.minimum(ahead, length - 1))


def _first_places(reach: np.ndarray, length: int, num_checkpoints: int) -> list[int]:
    """Where carries are kept on the way forward."""
    places = [0]
    while len(places) < num_checkpoints and length - places[-1] > 1:
        room = num_checkpoints - len(places)
        places.append(places[-1] + int(_steps_ahead(reach, length - places[-1], room, np)))
    return places
