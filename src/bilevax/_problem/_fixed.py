"""What does not depend on where it is evaluated: the Hessian of a quadratic function, say."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
from jax.extend.core import Jaxpr, Literal

_CALLS = ("jit", "pjit", "closed_call")


def is_fixed(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether the value of `fn` depends on none of its arguments, as far as its program shows."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return not any(_depend(jaxpr, [True] * len(jaxpr.invars)))


def once_if_fixed(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`fn`, evaluated once and for all where it does not depend on its arguments."""
    if not is_fixed(fn, *args):
        return fn
    value = fn(*args)
    return lambda *_: value


def _depend(jaxpr: Jaxpr, moving: Sequence[bool]) -> list[bool]:
    """Which results of a program depend on those of its arguments that move."""
    found = {v for v, is_moving in zip(jaxpr.invars, moving, strict=True) if is_moving}

    def moves(v: Any) -> bool:
        return not isinstance(v, Literal) and v in found

    for eqn in jaxpr.eqns:
        inputs = [moves(v) for v in eqn.invars]
        outputs = [any(inputs)] * len(eqn.outvars)
        if any(inputs) and eqn.primitive.name in _CALLS:
            called = [p for p in jtu.tree_leaves(list(eqn.params.values())) if hasattr(p, "jaxpr")]
            outputs = _depend(called[0].jaxpr, inputs)
        found |= {v for v, is_moving in zip(eqn.outvars, outputs, strict=True) if is_moving}
    return [moves(v) for v in jaxpr.outvars]
