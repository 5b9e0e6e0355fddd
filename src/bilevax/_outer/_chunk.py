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
from .._tree import closure_convert
from ._base import AbstractMethod
from ._best import Best
from ._evaluation import Evaluation

MAX_CHUNK = 64  # rows of the buffer of a chunk
REASONS = {0: None, 1: "tolerance", 2: "optimizer", 3: "failure", 4: "singular"}


@lean_jit
def init_method(problem: Bilevel, method: AbstractMethod, x0: PyTree, theta: PyTree) -> Any:
    problem = check_values(problem, start_at(x0, theta), theta)
    chosen, rule = getattr(method, "inner_solver", None), getattr(method, "hypergradient", None)
    solver = as_inner_solver(chosen, problem.inner, start_at(x0, theta))
    warn_of_structure(problem, solver, bool(rule and rule.differentiates_start), x0, theta)
    # Copied, because the chunks overwrite the state and the arrays are the caller's.
    x0, theta = copied((x0, theta))
    state = method.init(problem, x0, theta)
    seen = eqx.filter_eval_shape(_evaluate, problem, method, x0, state, jnp.array(True))[0]
    return state, Best.none(seen)


@lean_jit  # traced for its shapes, and not again for the chunks
def _evaluate(
    problem: Bilevel, method: AbstractMethod, x0: PyTree, state: Any, is_last: Array
) -> tuple[Evaluation, Any]:
    return method.evaluate(problem, x0, state, is_last)


def copied(tree: Any) -> Any:
    """Arrays that the next chunk does not overwrite."""
    return jtu.tree_map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, tree)


def _chunk(
    state: tuple[Any, Best],
    problem: Bilevel,
    method: AbstractMethod,
    x0: PyTree,
    first_row: Array,
    num_steps: Array,
    num_evaluations: Array,
    tolerance: Array,
) -> tuple[Any, tuple[Array, Array], tuple[str, ...], Array, Array]:
    """At most `num_evaluations` evaluations, and at most `num_steps` steps after them.

    `first_row` is how many evaluations there were before, for `Best`.
    The number of steps is an argument, so that chunks of any length are one program. Also
    returns the names of the columns.
    """
    dynamic, static = eqx.partition(state, eqx.is_array)
    theta = state[0].theta
    problem = check_values(problem, start_at(x0, theta), theta)

    def evaluate(dynamic: Any, is_last: Array, row: Array) -> tuple[Any, Evaluation]:
        state, best = eqx.combine(dynamic, static)
        seen, state = _evaluate(problem, method, x0, state, is_last)
        return eqx.filter((state, best.after(seen, row)), eqx.is_array), seen

    def step(dynamic: Any, seen: Evaluation) -> Any:
        state, best = eqx.combine(dynamic, static)
        return eqx.filter((method.step(problem, state, seen), best), eqx.is_array)

    example = (dynamic, jnp.array(True), first_row)
    evaluate = closure_convert(evaluate, *example)  # traced once
    struct = eqx.filter_eval_shape(evaluate, *example)[1]
    # One row of numbers an evaluation: a dozen small arrays would compile to a dozen kernels.
    buffers = jax.tree_util.tree_map(
        lambda s: jnp.zeros((MAX_CHUNK, *s.shape), s.dtype), eqx.filter_eval_shape(_pack, struct)
    )

    changes = method.for_singular() is not None

    zero = jnp.asarray(0, jnp.int32)

    def keep_going(carry: tuple) -> Array:
        _, _, count, reason = carry
        return (count < num_evaluations) & (reason == 0)

    def body(carry: tuple) -> tuple:
        dynamic, buffers, count, _ = carry
        steps = jnp.clip(num_steps - count * method.interval, 0, method.interval)
        dynamic, seen = evaluate(dynamic, steps == 0, first_row + count)
        buffers = jtu.tree_map(lambda b, row: b.at[count].set(row), buffers, _pack(seen))
        reason = _reason(seen, tolerance, changes)
        dynamic = jax.lax.fori_loop(zero, steps, lambda _, a: step(a, seen), dynamic)
        return dynamic, buffers, count + 1, reason

    carry = jax.lax.while_loop(keep_going, body, (dynamic, buffers, zero, zero))
    dynamic, buffers, count, reason = carry
    return eqx.combine(dynamic, static), buffers, _known(struct), count, reason


run_chunk = lean_jit(_chunk, donate_first=True)


def _reason(seen: Evaluation, tolerance: Array, changes: bool) -> Array:
    """The code, in `REASONS`, of what stops the run after this evaluation; 0 for nothing."""
    norm = seen.hypergradient_norm
    is_small = norm <= tolerance.astype(norm.dtype)
    is_small = is_small & (seen.result == RESULTS.successful)
    reason = jnp.where(is_small, 1, jnp.where(seen.should_stop, 2, 0))
    reason = jnp.where(seen.gave_up, 3, reason)
    if changes:
        reason = jnp.where(seen.result == RESULTS.singular, 4, reason)
    return reason.astype(jnp.int32)


_FLOATS = (
    "value",
    "hypergradient_norm",
    "inner_residual",
    "adjoint_residual",
    "error_estimate",
    "predicted_decrease",
)


def _known(seen: Evaluation) -> tuple[str, ...]:
    return tuple(name for name in _FLOATS if getattr(seen, name) is not None)


def _pack(seen: Evaluation) -> tuple[Array, Array]:
    """An evaluation as a row of floats and a row of integers; `columns` is the inverse."""
    floats = [getattr(seen, name) for name in _known(seen)]
    dtype = jnp.zeros(()).dtype
    integers = [seen.result.index, *(seen.stats[name] for name in STATS)]
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
