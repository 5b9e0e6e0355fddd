"""Why an inner solve failed: a kink, no minimum, rounding errors, or too few steps.

A program of its own, run where a solve was flagged: what succeeds does not pay for it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._problem import AbstractCondition
from .._results import RESULTS
from .._tree import (
    signs_like,
    tree_axpy,
    tree_dtype,
    tree_larger,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
)
from ._base import residual_and_scale
from ._kinks import jump_across, not_zero, step_across
from ._newton_direction import ROUNDING

# A kink that explains a residual is of its size.
_PART = 0.3
# Across a kink the jump stays when the step is halved; a smooth third order falls by eight.
_STAYS = 0.4
# Of a jump, what is left of it after that many halvings of the step, if it is one.
_HALVINGS, _LOCAL = 20, 1e-3
# Steps beyond x, in units of the way from the start, by which an objective without a
# minimum must have fallen on and on.
_BEYOND = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)


def explain(
    condition: AbstractCondition, x: PyTree, x0: PyTree, theta: PyTree, result: RESULTS
) -> RESULTS:
    """The outcome of a solve from `x0` that was flagged at `x`, named more exactly.

    About 40 gradients, nine Hessian products and 14 values.
    """
    residual, scale = residual_and_scale(condition, x, x0, theta)

    def fn(x: PyTree) -> PyTree:
        return condition.residual(x, theta)

    # The rounding errors of the gradient, as steps of a few of them show them.
    eps = float(jnp.finfo(tree_dtype(x)).eps)
    noise = 0.5 * jump_across(fn, x, tree_scale(8 * eps, x))
    is_floor = (residual <= 10 * noise) | (residual <= ROUNDING * eps * scale)
    why = RESULTS.where(is_floor, RESULTS.stalled, RESULTS.inner_not_converged)
    if condition.objective is not None:
        is_kink = _is_kink(condition, x, x0, theta, residual, eps**0.5 * scale)
        why = RESULTS.where(is_kink, RESULTS.not_smooth, why)
        why = RESULTS.where(_is_unbounded(condition, x, x0, theta), RESULTS.unbounded, why)
    is_open = (result == RESULTS.inner_not_converged) | (result == RESULTS.stalled)
    return RESULTS.where(is_open, why, result)


def _is_kink(
    condition: AbstractCondition,
    x: PyTree,
    x0: PyTree,
    theta: PyTree,
    residual: Scalar,
    least: Scalar,
) -> Bool[Array, ""]:
    """Whether the gradient jumps near x by as much as is left of it."""
    inner = condition.objective
    assert inner is not None

    def fn(x: PyTree) -> PyTree:
        return condition.residual(x, theta)

    step = step_across(tree_dtype(x))
    near = not_zero(x, x0)
    far = jtu.tree_map(lambda a: jnp.maximum(jnp.abs(a), 1), tree_larger(x, x0))
    sizes = [tree_scale(step, near), tree_scale(step, tree_larger(near, x0))]
    sizes += [tree_scale(step, far), tree_scale(30 * step, far)]
    signed = [jtu.tree_map(lambda a: a * signs_like(a), size) for size in sizes]
    stacked = jtu.tree_map(lambda *a: jnp.stack(a), *signed)

    def jumps(d: PyTree) -> Bool[Array, ""]:
        whole, half = (jump_across(fn, x, tree_scale(part, d)) for part in (1.0, 0.5))
        # Outside the domain of a logarithm its gradient may be a number all the same.
        is_inside = jnp.isfinite(
            inner(tree_axpy(1, d, x), theta) + inner(tree_axpy(-1, d, x), theta)
        )
        # False also where the gradient is not a number.
        return is_inside & (half >= _PART * residual) & (half > least) & (half >= _STAYS * whole)

    found = jax.lax.map(jumps, stacked)
    first = jtu.tree_map(lambda a: a[jnp.argmax(found)], stacked)
    return jnp.any(found) & _is_at_a_point(fn, x, first)


def _is_at_a_point(fn: Callable, x: PyTree, d: PyTree) -> Bool[Array, ""]:
    """Whether what `fn` jumps by between `x - d` and `x + d` is done at a point.

    A function that turns within a step jumps across that step, and not within a millionth of
    it. `_HALVINGS` evaluations; of two halves the one that holds more.
    """
    _, product = jax.jvp(fn, (x,), (d,))

    def at(t: Scalar) -> PyTree:
        return tree_axpy(-t, product, fn(tree_axpy(t, d, x)))

    def halve(_: int, state: tuple) -> tuple:
        low, high, below, above = state
        middle = 0.5 * (low + high)
        here = at(middle)
        is_left = tree_norm(tree_sub(here, below)) >= tree_norm(tree_sub(above, here))
        return (
            jnp.where(is_left, low, middle),
            jnp.where(is_left, middle, high),
            tree_where(is_left, below, here),
            tree_where(is_left, here, above),
        )

    one = jnp.ones((), tree_dtype(x))
    below, above = at(-one), at(one)
    whole = tree_norm(tree_sub(above, below))
    state = jax.lax.fori_loop(0, _HALVINGS, halve, (-one, one, below, above))
    return tree_norm(tree_sub(state[3], state[2])) > _LOCAL * whole


def _is_unbounded(
    condition: AbstractCondition, x: PyTree, x0: PyTree, theta: PyTree
) -> Bool[Array, ""]:
    """Whether the objective falls on and on, far beyond x."""
    inner = condition.objective
    assert inner is not None
    way = tree_sub(x, x0)
    dtype = tree_dtype(x)
    most = float(jnp.finfo(dtype).max)  # of float16, 65504
    beyond = jnp.asarray([t for t in _BEYOND if t < most], dtype)
    values = jax.lax.map(lambda t: inner(tree_axpy(t, way, x), theta), beyond)
    first, here = inner(x0, theta), inner(x, theta)
    is_falling = jnp.all(values[1:] < values[:-1]) | (values[-1] == -jnp.inf)
    is_far = values[-1] < here - 10 * jnp.abs(first - here)
    return is_falling & is_far & (values[0] < here) & (tree_norm(way) > 0)
