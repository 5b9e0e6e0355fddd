"""Under `jax_debug_nans` and `jax_debug_infs`: the user's line in which a number is lost.

JAX looks at what comes out of a compiled program, and runs that again operation by operation;
but not the inside of its loops, where the inner solvers call the user's functions.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._inner._base import AbstractInnerSolver
from .._inner._default import as_inner_solver
from .._problem import AbstractCondition, Bilevel, prepare, start_at
from .._results import RESULTS
from .._tree import debugged, largest_entry
from ._captured import Replaced, is_tracer

_NUM_POINTS = 50  # before x was lost: the steps of a line search, all tried from one x
_FAR = 1e6  # times the start: x has run away
_DIVERGED = (
    "The steps of the inner solver diverge: x is no longer finite, or so large that `inner` "
    "overflows. Reduce the step size, or start nearer to the solution."
)


def locating(fn: Callable, problem: Bilevel, inner_solver: Any, x0: PyTree, theta: PyTree) -> Any:
    """`fn()`; where JAX finds a NaN in what it returns, the error shows the user's line.

    So it does where `fn` returns a record, or first of all a record, that says there was one.
    """
    try:
        out = fn()
    except FloatingPointError:
        locate(problem, inner_solver, x0, theta)
        raise
    record: Any = out[0] if isinstance(out, tuple) and out else out
    result = getattr(record, "result", None)
    if any(debugged()) and isinstance(result, RESULTS) and is_nonfinite(result):
        more = [record.x] if hasattr(record, "x") else []
        locate(problem, inner_solver, x0, theta, *more)
    return out


def is_nonfinite(result: RESULTS) -> bool:
    """Whether a NaN or an infinity appeared, as far as that is known already."""
    if result.is_traced():
        return False
    return bool(np.all(np.asarray(result.index) == RESULTS.nonfinite.index))


def locate(problem: Bilevel, inner_solver: Any, x0: PyTree, theta: PyTree, *more: PyTree) -> None:
    """Raise JAX's `FloatingPointError` from the line in the user's functions, if there is one.

    These and their derivatives are evaluated outside of `jit`: at the start, at the points
    `more`, and then along the steps of the inner solver.
    """
    if not any(debugged()):
        return
    concrete = _concrete((problem, x0, theta, more))
    if concrete is None:
        return
    problem, x0, theta, more = concrete
    bound, start, theta = prepare(problem, x0, theta)
    x0 = start_at(start, theta)
    for x in (x0, *(prepare(problem, x, theta)[1] for x in more)):
        if _is_finite(x):
            _evaluate(bound, x, theta)
    solver = as_inner_solver(inner_solver, bound.inner, x0)
    for x in _along_the_steps(bound.inner, solver, x0, theta):
        if not _is_finite(x) or _has_run_away(bound, x, x0, theta):
            raise FloatingPointError(_DIVERGED)
        _evaluate(bound, x, theta)


def _evaluate(problem: Bilevel, x: PyTree, theta: PyTree) -> None:
    """What a rule asks for, operation by operation."""
    inner, (nans, infs) = problem.inner, debugged()
    # Said once more, for this thread: after a `with jax.debug_nans(False)`, of which JAX has some
    # of its own, JAX 0.10 checks no operation again that it has compiled before.
    with jax.disable_jit(), jax.debug_nans(nans), jax.debug_infs(infs):
        (inner.objective or inner.residual)(x, theta)
        inner.residual(x, theta)
        value, pull_back = jax.vjp(lambda *at: problem.outer_value(*at)[0], x, theta)
        pull_back(jnp.ones_like(value))
        jax.jvp(inner.residual, (x, theta), jtu.tree_map(jnp.ones_like, (x, theta)))


def _along_the_steps(
    condition: AbstractCondition, solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
) -> Iterator[PyTree]:
    """Where the solver looked: the last points at which x was finite, then where it was not."""
    finite: deque[PyTree] = deque(maxlen=_NUM_POINTS)
    lost: list[PyTree] = []
    fn: Callable = condition.fn

    def record(x: PyTree) -> None:
        if not lost:
            (finite if _is_finite(x) else lost).append(jtu.tree_map(np.array, x))

    def recorded(x: PyTree, *args: PyTree) -> PyTree:
        jax.debug.callback(record, x)
        return fn(x, *args)

    watched = eqx.tree_at(lambda c: c.fn, condition, recorded)
    with jax.debug_nans(False), jax.debug_infs(False):
        state = solver.init(watched, x0, theta)
        jax.jit(lambda x0, theta: solver.solve(watched, x0, theta, state)[0].x)(x0, theta)
        jax.effects_barrier()
    for x in (*reversed(finite), *lost):
        yield jtu.tree_map(jnp.asarray, x)


def _has_run_away(problem: Bilevel, x: PyTree, x0: PyTree, theta: PyTree) -> bool:
    """Whether what is lost at x is lost because x is far from everything."""
    if largest_entry(x) <= _FAR * (1 + largest_entry(x0)):
        return False
    inner = problem.inner
    with jax.debug_nans(False), jax.debug_infs(False):
        return not _is_finite((inner.objective or inner.residual)(x, theta))


def _is_finite(x: PyTree) -> bool:
    return all(bool(np.all(np.isfinite(leaf))) for leaf in jtu.tree_leaves(x))


def _concrete(tree: PyTree) -> PyTree | None:
    """`tree` with the numbers in its values that are being differentiated; `None` under `jit`."""
    has_number = True

    def number(value: Any) -> Any:
        nonlocal has_number
        while is_tracer(value) and hasattr(value, "primal"):
            value = value.primal
        has_number &= not is_tracer(value)
        return value

    tree = Replaced(tree, is_tracer, number).tree
    return tree if has_number else None
