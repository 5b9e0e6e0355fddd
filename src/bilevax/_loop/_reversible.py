"""A loop of SGD with momentum, run backwards exactly instead of being stored."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._tree import tree_zeros_like
from ._explicit import State, WayBack, repeat_with_way_back
from ._integers import (
    START_BITS,
    are_equal,
    as_fraction,
    largest,
    power_of_two,
    precision,
    to_float,
    to_int,
)
from ._probe import Probe, add_tap

# x and the momentum t as integers X and V, `gamma = n / d`, B an integer for each entry:
#
#     V' = G(X) + gamma V,  the remainder of the product kept in B;    X' = X + U(V')
#
# G is the rounded gradient, U the rounded update. Backwards X = X' - U(V'), and V from
# V' - G(X) and B: exact, whatever rounding did (Maclaurin et al. 2015, algorithm 3).

_LARGEST = 2.0**61
_STEPS_PER_WORD = 100  # one more word of lost bits for so many steps


def repeat_reversibly(
    step: Callable[[PyTree], PyTree],
    carry: PyTree[Array],
    length: int,
    probe: Probe | None = None,
) -> PyTree[Array]:
    """`step`, an update of `optax.sgd(learning_rate, momentum=...)`, applied `length` times.

    Keeps the last carry, the first (by which the way back is verified), and the bits that
    momentum loses: `log2(1 / momentum)` a step and entry, in words of 36 to 60 bits. There
    is room for one word in 100 steps.
    The way back takes every step again backwards, and differentiates it.

    The result is NaN, and so flagged, if a step is not one of momentum SGD (Nesterov's,
    clipped), if a number grows 2,000 times larger than at the start, or where there is no
    room for the lost bits (momentum below about 0.7, or 0.8 if it is no simple fraction).

    Reference: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization
    through reversible learning", 2015, algorithm 3.
    """
    _check(carry)

    def run(apply: Callable, state: State) -> State:
        return _forward(apply, state, length)[0]

    def forward(steps: WayBack, state: State) -> tuple[State, PyTree]:
        return _forward(steps.apply, state, length)

    def backward(
        steps: WayBack, kept: "_Kept", adjoint: PyTree, probe: Probe | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        def body(carry: tuple) -> tuple:
            now, adjoint, total, evidence = carry
            now = _step_back(steps.apply, kept, now)
            state = _state_at(kept, now.integers, now.num_steps)
            of_moving, adjoint = steps.pull_back(state, adjoint)
            if evidence is not None:
                evidence = add_tap(evidence, adjoint[0])
            return now, adjoint, jtu.tree_map(jnp.add, total, of_moving), evidence

        zeros = tree_zeros_like((steps.moving, probe))
        start = (kept.last, adjoint, *zeros)
        now, *out = jax.lax.while_loop(lambda c: c[0].num_steps > 0, body, start)
        is_right = kept.is_right & are_equal(now.integers, kept.first)
        adjoint, total, evidence = jtu.tree_map(lambda a: jnp.where(is_right, a, jnp.nan), out)
        return total, adjoint, evidence

    return repeat_with_way_back(step, carry, run, forward, backward, probe)


def there_and_back(
    step: Callable[[PyTree], PyTree], carry: PyTree[Array], length: int
) -> tuple[PyTree, PyTree]:
    """The integers of the first carry, and what running forward and back makes of them."""
    _check(carry)

    def apply(state: State) -> State:
        return _split(step(jtu.tree_map(lambda a, b: b if a is None else a, *state, is_leaf=_none)))

    _, kept = _forward(apply, _split(carry), length)
    now = jax.lax.while_loop(
        lambda now: now.num_steps > 0, lambda now: _step_back(apply, kept, now), kept.last
    )
    return kept.first, now.integers


class _Integers(NamedTuple):
    x: PyTree[Int[Array, "..."]]
    trace: PyTree[Int[Array, "..."]]


class _Now(NamedTuple):
    """Where the loop stands, forwards or backwards."""

    integers: _Integers
    buffer: PyTree[Int[Array, "..."]]  # B
    words: PyTree[Int[Array, "..."]]  # full buffers
    pushed_at: Int[Array, " words"]
    num_words: Int[Array, ""]
    bound: Scalar  # of the entries of the buffer
    num_steps: Int[Array, ""]


class _Kept(NamedTuple):
    last: _Now
    first: _Integers
    state: State  # the first; of its floating-point numbers only shapes and dtypes count
    slope: PyTree  # of the other numbers: counts grow by it at each step
    scales: tuple[Scalar, Scalar]
    ratio: tuple[Array, Array]  # n, d
    is_right: Bool[Array, ""]


def _forward(apply: Callable, state: State, length: int) -> tuple[State, _Kept]:
    x, trace = _float_parts(state)
    after = apply(state)
    first_x, first_trace = _float_parts(after)
    update_size = largest(jtu.tree_map(jnp.subtract, first_x, x))
    scales = (
        power_of_two(jnp.maximum(largest(x), update_size)),
        power_of_two(jnp.maximum(largest(trace), largest(first_trace))),
    )
    gamma, _ = _numbers(apply, state)
    ratio = as_fraction(gamma)
    first = _Integers(to_int(x, scales[0]), to_int(trace, scales[1]))
    room = length // _STEPS_PER_WORD + 2
    zeros = tree_zeros_like(first.x)
    now = _Now(
        integers=first,
        buffer=zeros,
        words=jtu.tree_map(lambda a: jnp.zeros((room, *a.shape), a.dtype), zeros),
        pushed_at=jnp.full(room, -1, jnp.int64),
        num_words=jnp.asarray(0, jnp.int64),
        bound=jnp.zeros((), jnp.float64),
        num_steps=jnp.asarray(0, jnp.int64),
    )
    slope = jtu.tree_map(jnp.subtract, after[1], state[1])
    kept = _Kept(now, first, state, slope, scales, ratio, jnp.array(True))
    is_right = (gamma > 0) & (gamma <= 1)
    is_right &= jnp.abs(
        gamma - ratio[0].astype(gamma.dtype) / ratio[1].astype(gamma.dtype)
    ) <= precision(gamma)

    def body(_: Any, carry: tuple) -> tuple:
        now, is_right = carry
        before = _state_at(kept, now.integers, now.num_steps)
        now, is_finite = _step_ahead(apply, kept, now)
        state = _state_at(kept, now.integers, now.num_steps)
        agrees = _agrees(state, apply(before), before, kept.scales)
        has_room = now.num_words < room
        return now, is_right & is_finite & agrees & has_room

    now, is_right = jax.lax.fori_loop(0, length, body, (now, is_right))
    kept = kept._replace(last=now, is_right=is_right)
    final, rest = _state_at(kept, now.integers, now.num_steps)
    return (jtu.tree_map(lambda a: jnp.where(is_right, a, jnp.nan), final), rest), kept


def _step_ahead(apply: Callable, kept: _Kept, now: _Now) -> tuple[_Now, Bool[Array, ""]]:
    n, d = kept.ratio
    # 1. a full buffer is put aside
    is_full = (now.bound + 1) * d.astype(now.bound.dtype) >= _LARGEST
    place = jnp.where(is_full, now.num_words, now.pushed_at.size)  # beyond the end: dropped
    now = now._replace(
        words=jtu.tree_map(lambda w, b: w.at[place].set(b, mode="drop"), now.words, now.buffer),
        pushed_at=now.pushed_at.at[place].set(now.num_steps, mode="drop"),
        num_words=now.num_words + is_full.astype(jnp.int64),
        buffer=jtu.tree_map(lambda b: jnp.where(is_full, 0, b), now.buffer),
        bound=jnp.where(is_full, 0.0, now.bound),
    )
    # 2. V' = G(X) + gamma V
    gradient, is_finite = _gradient(apply, kept, now)
    full = jtu.tree_map(lambda b, v: b * d + v % d, now.buffer, now.integers.trace)
    trace = jtu.tree_map(lambda v, b: (v // d) * n + b % n, now.integers.trace, full)
    trace = jtu.tree_map(jnp.add, trace, gradient)
    # 3. X' = X + U(V')
    update, is_small = _update(apply, kept, now, trace)
    x = jtu.tree_map(jnp.add, now.integers.x, update)
    is_small &= largest((x, trace)) < _LARGEST
    new = now._replace(
        integers=_Integers(x, trace),
        buffer=jtu.tree_map(lambda b: b // n, full),
        bound=(now.bound + 1) * d.astype(now.bound.dtype) / n.astype(now.bound.dtype),
        num_steps=now.num_steps + 1,
    )
    return new, is_finite & is_small


def _step_back(apply: Callable, kept: _Kept, now: _Now) -> _Now:
    n, d = kept.ratio
    now = now._replace(num_steps=now.num_steps - 1)
    update, _ = _update(apply, kept, now, now.integers.trace)
    x = jtu.tree_map(jnp.subtract, now.integers.x, update)
    now = now._replace(integers=now.integers._replace(x=x))
    gradient, _ = _gradient(apply, kept, now)
    trace = jtu.tree_map(jnp.subtract, now.integers.trace, gradient)
    full = jtu.tree_map(lambda b, v: b * n + v % n, now.buffer, trace)
    trace = jtu.tree_map(lambda v, b: (v // n) * d + b % d, trace, full)
    buffer = jtu.tree_map(lambda b: b // d, full)
    top = jnp.maximum(now.num_words - 1, 0)
    was_full = (now.num_words > 0) & (now.pushed_at[top] == now.num_steps)
    return now._replace(
        integers=_Integers(x, trace),
        buffer=jtu.tree_map(lambda b, w: jnp.where(was_full, w[top], b), buffer, now.words),
        num_words=now.num_words - was_full.astype(jnp.int64),
    )


def _gradient(apply: Callable, kept: _Kept, now: _Now) -> tuple[PyTree, Bool[Array, ""]]:
    """G(X): the momentum after a step that starts with none."""
    no_trace = now.integers._replace(trace=tree_zeros_like(now.integers.trace))
    # Alone, and not fused with what surrounds it: forwards and backwards rounded alike.
    state = jax.lax.optimization_barrier(_state_at(kept, no_trace, now.num_steps))
    _, trace = _float_parts(jax.lax.optimization_barrier(apply(state)))
    return to_int(trace, kept.scales[1]), largest(trace) * kept.scales[1] < _LARGEST


def _update(
    apply: Callable, kept: _Kept, now: _Now, trace: PyTree
) -> tuple[PyTree, Bool[Array, ""]]:
    """U(V'): the learning rate of this step times the new momentum."""
    state = _state_at(kept, now.integers, now.num_steps)
    gamma, rate = _numbers(apply, jax.lax.stop_gradient(state))
    factor = rate / gamma * (kept.scales[0] / kept.scales[1])
    update = jtu.tree_map(lambda v: factor * v.astype(factor.dtype), trace)
    return to_int(update, jnp.ones((), factor.dtype)), largest(update) < _LARGEST


def _numbers(apply: Callable, state: State) -> tuple[Scalar, Scalar]:
    """The momentum, and minus the learning rate times it: what a step makes of momentum 1."""
    x, trace = _float_parts(state)
    ones = jtu.tree_map(jnp.ones_like, trace)
    zeros = jtu.tree_map(jnp.zeros_like, x)
    tangent = _with_parts(state, zeros, ones)[0]
    _, moved = jax.jvp(lambda floats: apply((floats, state[1]))[0], (state[0],), (tangent,))
    x_dot, trace_dot = _float_parts((moved, state[1]))
    first = [jnp.ravel(jtu.tree_leaves(a)[0])[0].astype(jnp.float64) for a in (trace_dot, x_dot)]
    return first[0], first[1]


def _agrees(state: State, expected: State, before: State, scales: tuple) -> Bool[Array, ""]:
    """Whether a step of integers is the step of floating-point numbers, up to rounding."""
    is_right = jnp.array(True)
    parts = zip(
        _float_parts(state), _float_parts(expected), _float_parts(before), scales, strict=True
    )
    for ours, theirs, old, scale in parts:
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(ours))
        unit = jnp.maximum(jnp.maximum(largest(theirs), largest(old)), 2.0**START_BITS / scale)
        gap = largest(jtu.tree_map(jnp.subtract, ours, theirs))
        is_right &= gap <= 64 * eps * unit
    return is_right


def _state_at(kept: _Kept, integers: _Integers, count: Array) -> State:
    """The carry in floating-point numbers."""
    x, trace = _float_parts(kept.state)
    floats = [to_float(integers.x, x, kept.scales[0])]
    floats.append(to_float(integers.trace, trace, kept.scales[1]))
    rest = jtu.tree_map(lambda a, s: a + count.astype(a.dtype) * s, kept.state[1], kept.slope)
    return _with_parts((kept.state[0], rest), *floats)


def _float_parts(state: State) -> tuple[PyTree, PyTree]:
    """x, and the momentum in the structure of x."""
    x = state[0][0]
    trace = jtu.tree_leaves(state[0][1])
    return x, jtu.tree_unflatten(jtu.tree_structure(x), trace)


def _with_parts(state: State, x: PyTree, trace: PyTree) -> State:
    (_, slots, *others), rest = state
    slots = jtu.tree_unflatten(jtu.tree_structure(slots), jtu.tree_leaves(trace))
    return (x, slots, *others), rest


def _none(leaf: Any) -> bool:
    return leaf is None


def _split(carry: PyTree) -> State:
    floats = jtu.tree_map(lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, carry)
    others = jtu.tree_map(lambda a: None if jnp.issubdtype(a.dtype, jnp.inexact) else a, carry)
    return floats, others


def _check(carry: PyTree) -> None:
    """Raise unless `carry` can be that of `optax.sgd(..., momentum=...)`."""
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "checkpoints='reversible' computes in 64-bit integers: switch them on by "
            "jax.config.update('jax_enable_x64', True), or use checkpoints='sqrt'."
        )
    kind = optax.TraceState
    slots = jtu.tree_leaves(carry[1:], is_leaf=lambda s: isinstance(s, kind))
    traces = [s for s in slots if isinstance(s, kind)]
    others = [s for s in slots if not isinstance(s, kind)]
    is_known = len(traces) == 1 and all(jnp.issubdtype(a.dtype, jnp.integer) for a in others)
    leaves = jtu.tree_leaves(carry[0])
    is_known = is_known and all(jnp.issubdtype(a.dtype, jnp.floating) for a in leaves)
    if not is_known or [a.shape for a in jtu.tree_leaves(traces[0])] != [a.shape for a in leaves]:
        raise TypeError(
            "checkpoints='reversible' runs SGD with momentum backwards and nothing else: use "
            "bx.Descent(optax.sgd(learning_rate, momentum=...), num_steps=...), without rtol and "
            "atol, or checkpoints='sqrt', 'all', a number or bx.MemoryBudget(...)."
        )
