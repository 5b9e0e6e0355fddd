"""Kinks: points where a gradient jumps, so that x* does not move smoothly with theta.

At a kink that is met exactly (a lasso coefficient of zero, a hinge) the gradient that JAX
returns is one of many, and its zero says nothing. What tells is the gradient on both sides:
`g(x + d) - g(x - d) - 2 H d` is of third order in `d` where the objective is smooth, and
the jump of the gradient where a kink lies in between.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Bool, PyTree, Scalar

from .._problem import AbstractCondition
from .._results import RESULTS
from .._tree import signs_like, tree_dtype, tree_jump, tree_scale

# A jump of this part of the terms of a gradient is no rounding error, and moves x.
_JUMP = 1e-3
# How often a step is shortened, by eight.
_SHORTER = 4
# Results of these have a kink in their operands; comparisons, where something is selected.
_KINKED = frozenset(
    [
        "max",
        "min",
        "abs",
        "sign",
        "clamp",
        "sort",
        "top_k",
        "floor",
        "ceil",
        "round",
        "rem",
        "reduce_max",
        "reduce_min",
        "reduce_window_max",
        "cummax",
        "cummin",
        "argmax",
        "argmin",
        "select_and_gather_add",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    ]
)
# Functions of JAX that are smooth although they are written with such primitives.
_SMOOTH = frozenset(["logaddexp", "logaddexp2", "softplus", "log_softmax", "softmax", "logsumexp"])
_LOOPS = frozenset(("scan", "while", "cond"))


def flag_kink(
    condition: AbstractCondition,
    x: PyTree,
    x0: PyTree,
    theta: PyTree,
    scale: Scalar,
    result: RESULTS,
) -> RESULTS:
    """`not_smooth` where a successful `x` is at a kink; two gradients and a product.

    Again with shorter steps where there may be one: what is curved strongly within a step is
    smooth within a shorter one. Nothing is computed for functions in which nothing could have
    a kink.
    """
    is_objective = condition.objective is not None
    if not (is_objective and may_have_kinks(lambda x: condition(x, theta), x)):
        return result
    dtype = tree_dtype(x)
    longest = step_across(dtype)
    shortest = max(longest * 8.0**-_SHORTER, 16 * float(jnp.finfo(dtype).eps))
    size = not_zero(x, x0)

    def is_open(state: tuple) -> Bool[Array, ""]:
        is_kink, step = state
        return is_kink & (step >= shortest)

    def shorten(state: tuple) -> tuple:
        _, step = state
        direction = tree_scale(step, size)
        jump = jump_across(lambda x: condition.residual(x, theta), x, direction)
        # False where the gradient is not a number: outside the domain nothing is known.
        return (jump > _JUMP * scale) & (jump > 0), step / 8

    candidate = (result == RESULTS.successful, jnp.asarray(longest, dtype))
    is_kink, _ = jax.lax.while_loop(is_open, shorten, candidate)
    return RESULTS.where(is_kink, RESULTS.not_smooth, result)


def jump_across(
    residual: Callable[[PyTree], PyTree], x: PyTree[Array], direction: PyTree[Array]
) -> Scalar:
    """`tree_jump` of the residual, the signs of `d` a fixed pattern."""
    signed = jtu.tree_map(lambda a: jnp.abs(a) * signs_like(a), direction)
    return tree_jump(residual, x, signed)


def step_across(dtype: Any) -> float:
    """How far to step, relative to x: 1e-5 in float64, 1e-3 in float32.

    The cube root of the rounding errors is where they are as large as the third order.
    """
    return float(jnp.finfo(dtype).eps) ** (1 / 3)


def not_zero(x: PyTree[Array], x0: PyTree[Array]) -> PyTree[Array]:
    """Magnitudes of the variables to step by: of x; where that is zero, of x0; else one."""

    def size(x: Array, x0: Array) -> Array:
        return jnp.where(x != 0, jnp.abs(x), jnp.where(x0 != 0, jnp.abs(x0), 1))

    return jtu.tree_map(size, x, x0)


def may_have_kinks(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether a result of `fn` depends on x through a primitive that has kinks."""
    jaxpr = jax.make_jaxpr(fn)(x)
    return any(kinked for _, kinked in _follow(jaxpr, [(True, False)] * len(jaxpr.in_avals)))


# Of a value: whether it depends on x, and whether it does so through a kink.
_Trace = tuple[bool, bool]


def _follow(closed: ClosedJaxpr, operands: list[_Trace]) -> list[_Trace]:
    jaxpr = closed.jaxpr
    known: dict[Any, _Trace] = dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> _Trace:
        return (False, False) if isinstance(atom, Literal) else known.get(atom, (False, False))

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _through(equation, inputs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through(equation: Any, inputs: list[_Trace]) -> list[_Trace]:
    """What one equation makes of its operands."""
    name, params = equation.primitive.name, equation.params
    depends, kinked = any(d for d, _ in inputs), any(k for _, k in inputs)
    num = len(equation.outvars)
    is_nan_test = name == "ne" and len(set(map(id, equation.invars))) == 1
    if not depends or is_nan_test or name in {"stop_gradient", "is_finite"}:
        return [(False, False)] * num
    parts = [part for value in params.values() for part in _parts(value)]
    if _called(params, parts) in _SMOOTH:
        return [(True, kinked)] * num
    if len(parts) == 1 and name not in _LOOPS and len(parts[0].in_avals) == len(inputs):
        return _follow(parts[0], inputs)
    # Of a loop or a branch every operand counts as one that depends on x.
    inside = [_follow(part, [(True, False)] * len(part.in_avals)) for part in parts]
    kinked |= any(k for results in inside for _, k in results)
    return [(True, kinked or name in _KINKED)] * num


def _called(params: dict[str, Any], parts: list[ClosedJaxpr]) -> str | None:
    """The name of the function that an equation calls, if it calls one."""
    if "name" in params or len(parts) != 1:
        return params.get("name")
    # One with a derivative rule of its own: its name is kept for debugging only.
    return getattr(getattr(parts[0].jaxpr, "debug_info", None), "func_name", None)


def _parts(value: Any) -> list[ClosedJaxpr]:
    values = value if isinstance(value, tuple | list) else (value,)
    parts = [part for part in values if hasattr(part, "eqns")]
    return [p if isinstance(p, ClosedJaxpr) else ClosedJaxpr(p, ()) for p in parts]
