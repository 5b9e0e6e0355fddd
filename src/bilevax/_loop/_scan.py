"""A loop of known length that can be differentiated in little memory."""

import math
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, PyTree

from ._binomial import repeat_from_checkpoints
from ._budget import MemoryBudget, num_bytes, residual_bytes
from ._probe import Probe, tap
from ._reversible import repeat_reversibly

Checkpoints = Literal["sqrt", "all", "reversible"] | int | MemoryBudget

# Up to this many times the size of a carry, what a step computes is kept inside a segment,
# instead of taking the step a third time: with segments of the right length that fits into
# 4 sqrt(length) carries.
_MOST_RESIDUALS = 4.0


def check_checkpoints(checkpoints: Checkpoints) -> None:
    """Raise unless `checkpoints` is one of the policies."""
    is_count = False
    if isinstance(checkpoints, int) and not isinstance(checkpoints, bool):
        is_count = checkpoints >= 1
    is_policy = isinstance(checkpoints, str) and checkpoints in ("sqrt", "all", "reversible")
    if not (is_count or is_policy or isinstance(checkpoints, MemoryBudget)):
        raise ValueError(
            "`checkpoints` must be 'sqrt' (the default), 'all', 'reversible', the number of "
            f"carries to keep, at least 1, or bx.MemoryBudget(num_bytes); got {checkpoints!r}."
        )


def num_checkpoints(
    checkpoints: Checkpoints, step: Callable[[PyTree], PyTree], carry: PyTree[Array], length: int
) -> int:
    """The number of carries to keep in a loop of at most `length` steps."""
    if checkpoints == "reversible":
        raise TypeError(
            "checkpoints='reversible' needs a fixed number of steps: bx.Descent without rtol and "
            "atol, or Unrolled(num_steps=...). Use checkpoints='sqrt' where the solver stops "
            "by itself."
        )
    if checkpoints == "all":
        return length
    if isinstance(checkpoints, MemoryBudget):
        return min(checkpoints.num_carries(step, carry), length)
    if isinstance(checkpoints, int):
        return min(checkpoints, length)
    return math.ceil(math.sqrt(length))


def repeat(
    step: Callable[[PyTree], PyTree],
    carry: PyTree[Array],
    length: int,
    checkpoints: Checkpoints,
    probe: Probe | None = None,
) -> PyTree[Array]:
    """`step` applied `length` times.

    | policy | carries kept | steps taken again |
    |---|---|---|
    | "all" | all | each once |
    | "sqrt" | at most `4 sqrt(length)` | each once, or twice if a step computes a lot |
    | an integer s | s | each at most r times, `binom(s + r, r) >= length`, and once more |
    | `MemoryBudget` | what fits | the fewest |

    "all" keeps the carry of every step, but nothing from inside a step, which a plain scan
    keeps too, and which makes it slower for it. `probe`: see `_probe.py`.
    """
    if checkpoints == "reversible":
        return repeat_reversibly(step, carry, length, probe)
    if isinstance(checkpoints, MemoryBudget):
        checkpoints = checkpoints.policy(step, carry, length)
    if isinstance(checkpoints, int):
        if checkpoints < length:
            return repeat_from_checkpoints(step, carry, length, checkpoints, probe)
        checkpoints = "all"
    if checkpoints == "all":
        ratio, inside, around = 1.0, jax.checkpoint(step), _as_it_is
    else:
        ratio = residual_bytes(step, carry) / max(num_bytes(carry), 1)
        inside, around = step, jax.checkpoint
        if not 0 < ratio <= _MOST_RESIDUALS:
            ratio, inside = 1.0, jax.checkpoint(step)

    def segment(carry: PyTree, num_steps: int) -> PyTree:
        if probe is not None:
            carry = (tap(carry[0], probe), *carry[1:])
        return jax.lax.scan(lambda c, _: (inside(c), None), carry, None, length=num_steps)[0]

    num_segments, per_segment = _segments(length, ratio)
    if per_segment <= 1 or num_segments <= 1:
        return segment(carry, length)
    whole = around(lambda c: segment(c, per_segment))
    carry, _ = jax.lax.scan(lambda c, _: (whole(c), None), carry, None, length=num_segments)
    rest = length - num_segments * per_segment
    return segment(carry, rest) if rest else carry


def _as_it_is(fn: Callable) -> Callable:
    return fn


def _segments(length: int, ratio: float) -> tuple[int, int]:
    """The number of segments and their length; the rest is shorter than a segment.

    Least memory: `num_segments + ratio * per_segment` carries. A divisor of `length`
    nearby leaves no rest, which would have to be compiled on its own.
    """
    best = math.sqrt(length / ratio)
    nearby = range(max(math.ceil(0.7 * best), 1), math.floor(1.4 * best) + 1)
    divisors = [per for per in nearby if length % per == 0]
    per_segment = min(divisors, key=lambda per: abs(per - best), default=max(round(best), 1))
    return length // per_segment, per_segment
