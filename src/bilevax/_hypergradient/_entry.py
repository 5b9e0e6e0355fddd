"""`hypergradient`, `argmin` and `jacobian`: the rules as a user calls them."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from .._calls import naming
from .._inner._base import AbstractInnerSolver
from .._inner._default import as_inner_solver
from .._inner._explain import explain
from .._jit import lean_jit
from .._problem import (
    AbstractCondition,
    Bilevel,
    Minimum,
    as_arrays,
    bind,
    in_both_modes,
    prepare,
    restore,
    start_as_arrays,
    start_at,
)
from .._raise import error_if, unwrapped
from .._results import RESULTS, SolveError
from .._tree import is_traced, stop_gradient
from ._base import AbstractHypergradient, Estimate, HypergradientState, Query
from ._hoist import Hoisted
from ._locate import locating
from ._sharded import by_device
from ._structure import warn_of_structure
from .implicit._implicit import Implicit
from .implicit._minimum_norm import MinimumNorm

# Made once: making an Equinox module takes longer than many a hypergradient.
_DEFAULT = Implicit()


def hypergradient(
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    *,
    inner_solver: Any = None,
    rule: AbstractHypergradient | None = None,
    state: HypergradientState | None = None,
    throw: bool = True,
) -> tuple[Estimate, HypergradientState]:
    """One hypergradient, with its evidence, and the state that warm-starts the next.

    The total derivative of `L(x*(theta), theta)` in theta.

    **Arguments:**

    - `problem`: a `Bilevel`.
    - `x0`: where the inner solve starts; a pytree of floating-point arrays, which is held
        fixed, or a function of theta, which the rules that differentiate the steps
        differentiate, too.
    - `theta`: the outer variable; a pytree of floating-point arrays.
    - `inner_solver`: an Optimistix solver, `bx.NewtonCG()`, `bx.LBFGS()`, `bx.Descent(...)`,
        `bx.External(fn)`, `bx.Traceable(fn)` or `bx.Given()`. Default: `bx.NewtonCG()` for a
        minimum, Newton's method for a root, iteration for a fixed point.
    - `rule`: how `x*(theta)` is differentiated; `bx.Implicit()` by default. If the adjoint
        system then is singular, `bx.MinimumNorm()` takes over (not under your own `jit`).
    - `state`: from the previous call. The inner solve then starts at its `x` instead of
        `x0`, and the adjoint system at its `v`. A warm start compiles nothing new.
    - `throw`: raise `bx.SolveError` if the outcome is not successful. With `False`, look
        at `estimate.result`.

    **Returns:** the pair `(Estimate, state)`.

    **Derivatives:** with `bx.Implicit()` the value, the hypergradient, `x` and `v` may be
    differentiated again, forward and in reverse, in theta, in the data and in what the two
    functions close over: the derivative of `estimate.grad` is the Hessian. The rules that
    differentiate the steps pass on what their loops can; the others refuse with a `TypeError`.

    **Cost:** an inner solve and what the rule costs; `estimate.stats` counts the products.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.5) ** 2),
        )
        estimate, state = bx.hypergradient(problem, jnp.zeros(3), jnp.zeros(3))
        estimate.grad, estimate.inner_residual, estimate.adjoint_residual
        ```
    """
    check_types(problem, rule)
    rule = _DEFAULT if rule is None else rule
    x0 = start_as_arrays(x0)
    theta = as_arrays(theta)

    args = (problem, x0, theta, inner_solver, rule, state)
    return EstimateAndState(*by_device(partial(_hypergradient, throw=throw), *args, throw=throw))


def _hypergradient(
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    inner_solver: Any,
    rule: AbstractHypergradient,
    state: HypergradientState | None,
    *,
    throw: bool,
) -> tuple[Estimate, HypergradientState]:
    if state is None:
        state = _init(problem, inner_solver, rule, x0, theta)
    else:
        x0 = state.x
    if getattr(inner_solver, "needs_host", False) and not is_traced((problem, x0, theta)):
        inner_solver, x0 = run_on_host(problem, inner_solver, x0, theta)
    estimate, new_state = locating(
        partial(_estimate, problem, inner_solver, rule, x0, theta, state),
        *(problem, inner_solver, x0, theta),
    )
    if is_singular(rule, estimate.result):
        first, start = estimate, estimate.x
        estimate, new_state = _estimate(
            problem, inner_solver, MinimumNorm(), start, theta, new_state
        )
        estimate = estimate.also(RESULTS.successful, first.stats)
    if is_unexplained(estimate.result):
        estimate = estimate.also(explained(problem, x0, theta, estimate.x, estimate.result))
    return raise_failure(estimate) if throw else estimate, new_state


class EstimateAndState(NamedTuple):
    """What `hypergradient` returns: a pair, to be unpacked."""

    estimate: Estimate
    state: HypergradientState

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if name in Estimate.__dataclass_fields__:
            hint = (
                " bx.hypergradient returns a pair: write `estimate, state = bx.hypergradient(...)` "
                f"and then `estimate.{name}`."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}.{hint}")


def is_unexplained(result: RESULTS) -> bool:
    """Whether the inner solve failed in a way that `explained` may name more exactly."""
    return _is(result, RESULTS.inner_not_converged, RESULTS.stalled)


def is_singular(rule: AbstractHypergradient, result: RESULTS) -> bool:
    """Whether `MinimumNorm` is to take over from the rule, which found a singular system."""
    return rule.is_default and _is(result, RESULTS.singular)


def _is(result: RESULTS, *outcomes: RESULTS) -> bool:
    """Whether the outcome is known already and is one of these.

    By NumPy, because the eager comparison of two outcomes would be compiled first.
    """
    if isinstance(result.index, jax.core.Tracer):
        return False
    index = np.asarray(result.index)
    return any(bool(np.all(index == outcome.index)) for outcome in outcomes)


def argmin(
    inner: Callable | AbstractCondition | Bilevel,
    inner_solver: Any = None,
    rule: AbstractHypergradient | None = None,
    *,
    throw: bool = True,
) -> Callable[[PyTree, PyTree], PyTree]:
    """The solution map `x*(theta)` as a differentiable function.

    `jax.grad`, `jvp`, `vmap`, `jit`, `shard_map` pass through it, and for `Implicit` second
    derivatives too. `inner` may close over anything, traced values included; those are
    differentiated as theta is.

    **Arguments:**

    - `inner`: `(x, theta) -> scalar`, or a condition such as `bx.Root(fn)`,
        `bx.Minimum(fn, data)`, or a `Bilevel`, whose inner level is meant.
    - `inner_solver`, `rule`: as in `bx.hypergradient`.
    - `throw`: raise where the inner or the adjoint solve fails (forwards and backwards).
        With `False` the failed result is NaN: nothing wrong comes out silently.

    **Returns:** a function `(x0, theta) -> x`. `x0` is an argument like theta: the rules that
    differentiate the steps differentiate it, too. (In `bx.hypergradient` and `bx.solve` a
    point `x0` is held fixed; there a start that depends on theta is given as a function.)

    With a solution that you have found yourself, `bx.argmin(bx.Root(fn), bx.Given())` attaches
    its derivative to it: JAXopt's `custom_root`.

    **Cost:** an inner solve; a derivative costs what the rule costs. A derivative rule
    cannot return a residual or take a warm start: where these matter use
    `bx.hypergradient`.

    !!! example

        ```python
        import bilevax as bx, jax, jax.numpy as jnp

        x_star = bx.argmin(lambda x, theta: jnp.sum((x - theta) ** 2 + x**2))
        jax.grad(lambda theta: jnp.sum(x_star(jnp.zeros(3), theta) ** 2))(jnp.ones(3))
        ```

    Reference: Blondel et al., "Efficient and modular implicit differentiation", 2022, eq. (2).
    """
    if isinstance(inner, Bilevel):
        inner = inner.inner
    condition = inner if isinstance(inner, AbstractCondition) else Minimum(inner)
    problem = Bilevel(condition, _no_outer)
    check_types(problem, rule)
    differentiate = _DEFAULT if rule is None else rule

    def x_star(x0: PyTree, theta: PyTree) -> PyTree:
        x0 = start_as_arrays(x0)
        theta = as_arrays(theta)
        with unwrapped():
            x = by_device(solved, problem, x0, theta, inner_solver, differentiate, throw=throw)
            # Outside of every transformation an error is raised here, not where x is used.
            return x if is_traced(x) or not throw else jax.block_until_ready(x)

    def solved(
        problem: Bilevel,
        x0: PyTree,
        theta: PyTree,
        inner_solver: Any,
        rule: AbstractHypergradient,
    ) -> PyTree:
        solve = _jitted_solution
        inner, hoisted = _hoist(problem, x0, theta)
        has_tracer = any(fn.program.has_tracer for fn in hoisted)
        if has_tracer or is_traced(hoisted):
            problem = eqx.tree_at(lambda p: p.inner, problem, inner)
        # A traced value that lives in this call only: a compiled function that is kept
        # for the next call must not see it.
        solve = _solution if has_tracer else solve
        call = partial(solve, problem, inner_solver, rule, x0, theta, throw)
        return locating(call, problem, inner_solver, x0, theta)

    return x_star


def check_types(problem: Any, rule: Any = None) -> None:
    """Clear errors for the two mistakes that the entry points share."""
    if not isinstance(problem, Bilevel):
        raise TypeError(f"`problem` must be a bx.Bilevel; got {type(problem).__name__}.")
    if not (rule is None or isinstance(rule, AbstractHypergradient)):
        hint = ""
        if isinstance(rule, optax.GradientTransformation):
            hint = " An Optax optimiser goes into bx.DoubleLoop(optimizer=...)."
        elif isinstance(rule, str):
            hint = " bx.solve(..., rule='auto') and bx.recommend(...) choose a rule for you."
        raise TypeError(
            "The rule must be a rule of bilevax, bx.Implicit(), bx.Unrolled(), bx.Truncated(...), "
            f"bx.OneStep() or another; got {type(rule).__name__}.{hint}"
        )


def raise_failure(estimate: Any) -> Any:
    """`estimate`, or a `SolveError` that says what to do next.

    Inside somebody else's `jit` the outcome is not known yet: the error is then raised
    when the compiled program meets it.
    """
    result = estimate.result
    if _is(result, RESULTS.successful):
        return estimate
    if result.is_traced():
        with unwrapped():
            return error_if(estimate, result, result != RESULTS.successful)
    numbers = f"inner residual {float(estimate.inner_residual):.2e}"
    if estimate.inner_tolerance is not None:
        numbers += f" (tolerance {float(estimate.inner_tolerance):.2e})"
    if estimate.adjoint_residual is not None:
        numbers += f", relative adjoint residual {np.max(estimate.adjoint_residual):.2e}"
    if getattr(estimate, "error_estimate", None) is not None:
        numbers += f", estimated error {float(estimate.error_estimate):.2e}"
    raise SolveError(f"{RESULTS[result]} [{numbers}; pass throw=False to get it anyway]", result)


def run_on_host(
    problem: Bilevel, solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
) -> tuple[AbstractInnerSolver, PyTree]:
    """The solver for the program, and what the host has found, in the user's own structure."""
    bound, start, theta_arrays = prepare(problem, x0, theta)
    solver, x = solver.before(bound.inner, start_at(start, theta_arrays), theta_arrays)
    return solver, restore(bound.inner, x, theta_arrays)[0]


@lean_jit
def explained(problem: Bilevel, x0: PyTree, theta: PyTree, x: PyTree, result: RESULTS) -> RESULTS:
    """The outcome of an inner solve from `x0` that failed at `x`; see `_inner/_explain.py`."""
    bound, start, theta_arrays = bind(problem, x0, theta)
    _, x, _ = bind(problem, x, theta)
    condition = in_both_modes(bound.inner, x, theta_arrays)
    return explain(condition, x, start_at(start, theta_arrays), theta_arrays, result)


@lean_jit
def _init(
    problem: Bilevel, inner_solver: Any, rule: AbstractHypergradient, x0: PyTree, theta: PyTree
) -> HypergradientState:
    bound, start, theta_arrays = prepare(problem, x0, theta)
    solver = as_inner_solver(inner_solver, bound.inner, start_at(start, theta_arrays))
    warn_of_structure(bound, solver, rule.differentiates_start, start, theta_arrays)
    state = stop_gradient(rule.init(Query(bound, solver, start, theta_arrays)))
    return _in_user_structure(state, bound, theta_arrays)


def _is_closed(fn: Callable) -> bool:
    """Whether it is plain to see that `fn` closes over nothing."""
    return isinstance(fn, types.FunctionType) and fn.__closure__ is None


def _hoist(problem: Bilevel, x0: PyTree, theta: PyTree) -> tuple[AbstractCondition, list[Hoisted]]:
    """The inner condition with what its functions close over as leaves, and these functions."""
    condition, hoisted = problem.inner, []
    data = () if problem.inner_data is None else (problem.inner_data,)

    def hoist(fn: Callable) -> Callable:
        if _is_closed(fn):
            return fn
        if not hoisted:
            bind(problem, x0, theta)  # refuses what can be no variable
        x = _user_start(condition, x0, theta)
        with naming("inner", x=x, theta=theta, **dict(zip(("data",), data, strict=False))):
            hoisted.append(Hoisted(fn, x, theta, *data))
        return hoisted[-1]

    return condition.map_functions(hoist), hoisted


def _user_start(condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
    """The user's x at the start, also where `x0` is an unknown that came back."""
    return condition.primal(condition.unknown(start_at(x0, theta), theta))


def _lift(problem: Bilevel, *args: Any) -> tuple:
    """The arguments of `_estimate`, with what the functions close over as arrays."""
    _, _, x0, theta, _ = args
    data = () if problem.outer_data is None else (problem.outer_data,)
    inner, _ = _hoist(problem, x0, theta)
    outer = Hoisted(problem.outer, _user_start(inner, x0, theta), theta, *data)
    return eqx.tree_at(lambda p: (p.inner, p.outer), problem, (inner, outer)), *args


@partial(lean_jit, lift=_lift)
def _estimate(
    problem: Bilevel,
    inner_solver: Any,
    rule: AbstractHypergradient,
    x0: PyTree,
    theta: PyTree,
    state: HypergradientState,
) -> tuple[Estimate, HypergradientState]:
    bound, start, theta_arrays = prepare(problem, x0, theta)
    solver = as_inner_solver(inner_solver, bound.inner, start_at(start, theta_arrays))
    _check_state(rule, state, rule.init(Query(bound, solver, start, theta_arrays)))
    query = Query(bound, solver, start, theta_arrays)
    estimate, state = rule.differentiable_estimate(query, state)
    return (
        _in_user_structure(estimate, bound, theta_arrays),
        _in_user_structure(state, bound, theta_arrays),
    )


def _check_state(
    rule: AbstractHypergradient, state: HypergradientState, fresh: HypergradientState
) -> None:
    """Raise if `state` comes from another problem, inner solver or rule."""

    def shapes(state: HypergradientState) -> Any:
        arrays = eqx.filter((state.v, state.inner), eqx.is_array)
        return [(a.shape, str(a.dtype)) for a in jax.tree_util.tree_leaves(arrays)]

    if shapes(state) != shapes(fresh):
        raise ValueError(
            f"`state` does not fit: `{type(rule).__name__}` with this inner solver expects "
            f"{shapes(fresh)} for (v, the solver's state); got {shapes(state)}. Give the state "
            "that the same call returned, or state=None."
        )


def _in_user_structure(record: Any, bound: Bilevel, theta: PyTree) -> Any:
    """`record` with the non-array leaves of x put back."""
    x, _ = restore(bound.inner, record.x, theta)
    return eqx.tree_at(lambda r: r.x, record, x, is_leaf=lambda leaf: leaf is None)


def _solution(
    problem: Bilevel,
    inner_solver: Any,
    rule: AbstractHypergradient,
    x0: PyTree,
    theta: PyTree,
    throw: bool,
) -> PyTree:
    bound, start, theta_arrays = prepare(problem, x0, theta)
    solver = as_inner_solver(inner_solver, bound.inner, start_at(start, theta_arrays))
    x = rule.solution(Query(bound, solver, start, theta_arrays), throw)
    return restore(bound.inner, bound.inner.primal(x), theta_arrays)[0]


_jitted_solution = lean_jit(_solution)


def _no_outer(x: PyTree, theta: PyTree) -> jax.Array:
    del x, theta
    return jnp.zeros(())
