"""A loop of known length that can be differentiated in little memory."""

import math
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, PyTree

Checkpoints = Literal["sqrt", "all"] | int


def check_checkpoints(checkpoints: Checkpoints) -> None:
    """Raise unless `checkpoints` is one of the policies."""
    is_count = isinstance(checkpoints, int) and checkpoints >= 1
    if not (is_count or checkpoints in ("sqrt", "all")):
        raise ValueError(
            "`checkpoints` must be 'sqrt' (the default), 'all' or the number of carries to "
            f"keep, at least 1; got {checkpoints!r}."
        )


def num_checkpoints(checkpoints: Checkpoints, length: int) -> int:
    """The number of carries kept for a loop of `length` steps."""
    if checkpoints == "all":
        return length
    if checkpoints == "sqrt":
        return math.ceil(math.sqrt(length))
    return min(int(checkpoints), length)


def repeat(
    step: Callable[[PyTree], PyTree],
    carry: PyTree[Array],
    length: int,
    checkpoints: Checkpoints,
) -> PyTree[Array]:
    """`step` applied `length` times.

    Reverse mode keeps the carry at the start of each of `s` segments and, while it goes
    back through one segment, the carry of each of its `length / s` steps, and recomputes
    the rest: for `s = sqrt(length)` about `2 sqrt(length)` carries and one more forward
    pass. "all" keeps the carry of every step (but nothing from inside a step, which a
    plain scan keeps too, and which makes it slower for it).
    """
    step = jax.checkpoint(step)

    def segment(carry: PyTree, num_steps: int) -> PyTree:
        return jax.lax.scan(lambda c, _: (step(c), None), carry, None, length=num_steps)[0]

    segments = num_checkpoints(checkpoints, length)
    per_segment = length // segments
    if per_segment <= 1:
        return segment(carry, length)
    whole = jax.checkpoint(lambda c: segment(c, per_segment))
    carry, _ = jax.lax.scan(lambda c, _: (whole(c), None), carry, None, length=segments)
    rest = length - segments * per_segment
    # The remainder is shorter than the number of segments: no second level.
    return segment(carry, rest) if rest else carry
