"""What does not depend on where it is evaluated: the Hessian of a quadratic function, say."""

from collections.abc import Callable
from typing import Any

import jax

# Calls whose arguments are, one by one, those of the program inside.
_CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint")


def is_fixed(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether the value of `fn` depends on none of its arguments, as far as its program shows."""
    return not any(reaching(jax.make_jaxpr(fn)(*args).jaxpr))


def once_if_fixed(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`fn`, evaluated once and for all where it does not depend on its arguments."""
    if not is_fixed(fn, *args):
        return fn
    value = fn(*args)
    return lambda *_: value


def reaching(jaxpr: Any, wanted: list[bool] | None = None) -> list[bool]:
    """Which inputs reach the outputs, walking back from these."""
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    needed = {id(v) for v, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted}
    for equation in reversed(jaxpr.eqns):
        results = [id(v) in needed for v in equation.outvars]
        if not any(results) or _is_one(equation):
            continue
        uses = [True] * len(equation.invars)
        called = equation.params.get("jaxpr") if equation.primitive.name in _CALLS else None
        called = getattr(called, "jaxpr", called)
        if called is not None and len(called.invars) == len(uses):
            uses = reaching(called, results)
        needed |= {id(v) for v, is_used in zip(equation.invars, uses, strict=True) if is_used}
    return [id(v) in needed for v in jaxpr.invars]


def _is_one(equation: Any) -> bool:
    """Whether it is a zeroth power, with which older JAX differentiates a square."""
    return equation.primitive.name == "integer_pow" and equation.params["y"] == 0
