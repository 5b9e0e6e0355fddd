"""Reverse mode through steps that contain loops of unknown length."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._tree import checkpointed_while_loop
from ._rewrite import rewrite, while_parts

# Carries kept of one such loop. A line search takes a few steps and a linear solve by CG
# rarely more than 100, whose states are recomputed at most three times from 16.
_NUM_CHECKPOINTS = 16


def differentiable_loops(step: Callable[[PyTree], PyTree], carry: PyTree) -> Callable:
    """`step`, its `while` loops replaced by checkpointed ones; `step` itself if it has none.

    JAX has no reverse mode for a loop of unknown length, and a checkpointed one no forward
    mode. The values are those of `step`. Loops that carry no floating-point numbers stay.
    """
    return rewrite(step, {"while": _checkpointed}, carry)


def has_loops(step: Callable[[PyTree], PyTree], carry: PyTree) -> bool:
    """Whether there are loops in it that `differentiable_loops` would replace."""
    found: list[bool] = []

    def look(run: Callable, params: dict, operands: list) -> None:
        found.append(_carries_numbers(while_parts(run, params, operands)[2]))

    jax.eval_shape(rewrite(step, {"while": look}, carry), carry)
    return any(found)


def _carries_numbers(start: list) -> bool:
    return any(jnp.issubdtype(x.dtype, jnp.inexact) for x in start)


def _checkpointed(run: Callable, params: dict, operands: list) -> list | None:
    keep_going, body, start = while_parts(run, params, operands)
    if not _carries_numbers(start):
        return None
    return checkpointed_while_loop(keep_going, body, start, checkpoints=_NUM_CHECKPOINTS)
