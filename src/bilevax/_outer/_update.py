"""One interface to the two kinds of outer optimiser: Optax and Optimistix."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from .._hypergradient._base import Estimate
from .._tree import Opaque, standard_promotion, strong, tree_dot, tree_sub


def initial_update(optimizer: Any, theta: PyTree) -> PyTree:
    """The optimiser's state before the first step."""
    if isinstance(optimizer, optax.GradientTransformation):
        with standard_promotion():
            return strong(optimizer.init(theta))
    struct = jax.eval_shape(lambda: tree_dot(theta, theta))
    state = optimizer.init(_no_function, theta, None, {}, struct, None, _TAGS)
    dynamic, static = eqx.partition(state, eqx.is_array)
    _check_evaluates_once(optimizer, state)
    return dynamic, Opaque(static)


def next_point(optimizer: Any, theta: PyTree, state: PyTree) -> PyTree:
    """Where the optimiser wants the hypergradient: theta, or the trial of a line search."""
    if not can_reject(optimizer):
        return theta
    dynamic, static = state
    return eqx.combine(dynamic, static.value).y_eval


def can_reject(optimizer: Any) -> bool:
    """Whether the optimiser tries points that it may take back: it searches along a line."""
    return not isinstance(optimizer, optax.GradientTransformation | optx.OptaxMinimiser)


def rejected(estimate: Estimate, usable: Bool[Array, ""]) -> Estimate:
    """`estimate`; where it is not usable, one that a line search rejects."""
    grad = jtu.tree_map(lambda a: jnp.where(usable, a, 0), estimate.grad)
    value = jnp.where(usable, estimate.value, jnp.inf)
    return eqx.tree_at(lambda e: (e.value, e.grad), estimate, (value, grad))


def update(
    optimizer: Any, theta: PyTree, state: PyTree, estimate: Estimate
) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    """`(theta, state, done)` after a step on `estimate`, taken at `next_point`."""
    if isinstance(optimizer, optax.GradientTransformation):
        return _optax_update(optimizer, theta, state, estimate)
    return _optimistix_update(optimizer, theta, state, estimate)


def _optax_update(
    optimizer: optax.GradientTransformation, theta: PyTree, state: PyTree, estimate: Estimate
) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    optimizer = optax.with_extra_args_support(optimizer)
    try:
        with standard_promotion():
            updates, new_state = optimizer.update(
                estimate.grad, state, theta, value=estimate.value, grad=estimate.grad
            )
            new_theta = optax.apply_updates(theta, updates)
    except TypeError as error:
        if "value_fn" not in str(error):
            raise
        raise TypeError(
            "This Optax optimiser searches along a line and wants to evaluate the outer "
            "objective by itself. Use an Optimistix minimiser such as optx.BFGS(rtol, atol), "
            "or optax.lbfgs(learning_rate, linesearch=None)."
        ) from error
    return new_theta, strong(new_state), jnp.array(False)


def _optimistix_update(
    optimizer: optx.AbstractMinimiser, theta: PyTree, state: PyTree, estimate: Estimate
) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    dynamic, static = state
    point = next_point(optimizer, theta, state)

    @jax.custom_jvp
    def value_at(theta: PyTree) -> Array:
        # The optimiser evaluates once a step, at `point`. Anywhere else we know nothing.
        moved = tree_sub(theta, point)
        return jnp.where(tree_dot(moved, moved) == 0, estimate.value, jnp.nan)

    @value_at.defjvp
    def value_at_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        return value_at(*primals), tree_dot(estimate.grad, tangents[0])

    def fn(theta: PyTree, args: None) -> tuple[Array, None]:
        del args
        return value_at(theta), None

    solver_state = eqx.combine(dynamic, static.value)
    new_theta, new_state, _ = optimizer.step(fn, theta, None, {}, solver_state, _TAGS)
    done, _ = optimizer.terminate(fn, new_theta, None, {}, new_state, _TAGS)
    new_dynamic, _ = eqx.partition(new_state, eqx.is_array)
    new_dynamic = jtu.tree_map(lambda a, b: a.astype(b.dtype), new_dynamic, dynamic)
    return new_theta, (new_dynamic, static), jnp.asarray(done)


_TAGS: frozenset[object] = frozenset()


def _no_function(theta: PyTree, args: None) -> Any:
    raise AssertionError("an outer optimiser must not evaluate before its first step")


def _check_evaluates_once(optimizer: Any, state: Any) -> None:
    if not (isinstance(optimizer, optx.OptaxMinimiser) or hasattr(state, "y_eval")):
        raise TypeError(
            "As outer optimiser an Optimistix minimiser must evaluate the objective once a "
            "step, with its gradient: optx.BFGS, optx.LBFGS, optx.DFP, optx.GradientDescent, "
            f"optx.NonlinearCG. {type(optimizer).__name__} does not."
        )
