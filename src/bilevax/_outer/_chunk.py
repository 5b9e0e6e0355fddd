"""Many outer steps as one compiled program."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._hypergradient._base import STATS
from .._hypergradient._structure import warn_of_structure
from .._inner._default import as_inner_solver
from .._jit import lean_jit
from .._problem import Bilevel, check_values, start_at
from .._results import RESULTS
from ._base import AbstractMethod, StepInfo
from ._best import Best

MAX_CHUNK = 64  # rows of the buffer of a chunk
REASONS = {0: None, 1: "tolerance", 2: "optimizer", 3: "failure", 4: "singular"}


@lean_jit
def init_method(problem: Bilevel, method: AbstractMethod, x0: PyTree, theta: PyTree) -> Any:
    problem = check_values(problem, start_at(x0, theta), theta)
    chosen, rule = getattr(method, "inner_solver", None), getattr(method, "hypergradient", None)
    solver = as_inner_solver(chosen, problem.inner, start_at(x0, theta))
    warn_of_structure(problem, solver, bool(rule and rule.differentiates_start), x0, theta)
    # Copied, because the chunks overwrite the state and the arrays are the caller's.
    x0, theta = jtu.tree_map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, (x0, theta))
    state = method.init(problem, x0, theta)
    info = eqx.filter_eval_shape(method.step, problem, x0, state, jnp.array(True))[1]
    return state, Best.none(state, info.value_range[0])


def _chunk(
    state: tuple[Any, Best],
    problem: Bilevel,
    method: AbstractMethod,
    x0: PyTree,
    first_row: Array,
    num_moves: Array,
    num_evaluations: Array,
    tolerance: Array,
) -> tuple[Any, tuple[Array, Array], tuple[str, ...], Array, Array]:
    """At most `num_evaluations` steps, of which the first `num_moves` move theta.

    `first_row` is how many evaluations there were before, for `Best`.
    The number of steps is an argument, so that chunks of any length are one program. Also
    returns the names of the columns.
    """
    dynamic, static = eqx.partition(state, eqx.is_array)
    theta = state[0].theta
    problem = check_values(problem, start_at(x0, theta), theta)

    def step(dynamic: Any, move: Array, row: Array) -> tuple[Any, StepInfo]:
        state, best = eqx.combine(dynamic, static)
        new_state, info = method.step(problem, x0, state, move)
        new_best = best.after(new_state, info, row)
        return eqx.filter((new_state, new_best), eqx.is_array), info

    # One row of numbers a step: a dozen small arrays would compile to a dozen kernels.
    info_struct = jax.eval_shape(step, dynamic, jnp.array(True), first_row)[1]
    buffers = jax.tree_util.tree_map(
        lambda s: jnp.zeros((MAX_CHUNK, *s.shape), s.dtype), jax.eval_shape(_pack, info_struct)
    )

    changes = method.for_singular() is not None

    def keep_going(carry: tuple) -> Array:
        _, _, count, reason = carry
        return (count < num_evaluations) & (reason == 0)

    def body(carry: tuple) -> tuple:
        dynamic, buffers, count, _ = carry
        dynamic, info = step(dynamic, count < num_moves, first_row + count)
        buffers = jtu.tree_map(lambda b, row: b.at[count].set(row), buffers, _pack(info))
        return dynamic, buffers, count + 1, _reason(info, tolerance, changes)

    zero = jnp.asarray(0, jnp.int32)
    carry = jax.lax.while_loop(keep_going, body, (dynamic, buffers, zero, zero))
    dynamic, buffers, count, reason = carry
    return eqx.combine(dynamic, static), buffers, _known(info_struct), count, reason


run_chunk = lean_jit(_chunk, donate_first=True)


def _reason(info: StepInfo, tolerance: Array, changes: bool) -> Array:
    """The code, in `REASONS`, of what stops the run after this step; 0 for nothing."""
    norm = info.hypergradient_norm
    is_small = norm <= tolerance.astype(norm.dtype)
    is_small = is_small & (info.result == RESULTS.successful)
    reason = jnp.where(is_small, 1, jnp.where(info.should_stop, 2, 0))
    reason = jnp.where(info.gave_up, 3, reason)
    if changes:
        reason = jnp.where(info.result == RESULTS.singular, 4, reason)
    return reason.astype(jnp.int32)


_FLOATS = (
    "value",
    "hypergradient_norm",
    "inner_residual",
    "adjoint_residual",
    "error_estimate",
    "predicted_decrease",
)


def _known(info: StepInfo) -> tuple[str, ...]:
    return tuple(name for name in _FLOATS if getattr(info, name) is not None)


def _pack(info: StepInfo) -> tuple[Array, Array]:
    """An info as a row of floats and a row of integers; `columns` is the inverse."""
    floats = [getattr(info, name) for name in _known(info)]
    dtype = jnp.zeros(()).dtype
    integers = [info.result.index, *(info.stats[name] for name in STATS)]
    return (
        jnp.stack([jnp.asarray(a, dtype) for a in floats]),
        jnp.stack([jnp.asarray(a, jnp.int32) for a in integers]),
    )


def columns(
    rows: tuple[np.ndarray, np.ndarray], known: tuple[str, ...]
) -> dict[str, np.ndarray | None]:
    """The columns of the history in the rows of a chunk; `None` for what nobody knows."""
    floats, integers = rows
    columns = {**dict.fromkeys(_FLOATS), **dict(zip(known, floats.T, strict=True))}
    names = ("result", *STATS)
    return {**columns, **dict(zip(names, integers.T, strict=True))}
