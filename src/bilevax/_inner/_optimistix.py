"""Any Optimistix solver as an inner solver."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar

from .._checks import check_positive
from .._jit import Opaque
from .._problem import AbstractCondition, as_arrays
from .._results import RESULTS
from .._tree import (
    default_rtol,
    tree_all_finite,
    tree_astype,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_where,
)
from ._base import ROUNDING, AbstractSteppingSolver, Counts, InnerSolution, measure, run
from ._kinks import flag_kink
from ._measured import AbstractMeasuredMinimiser
from ._nelder_mead import ranked, simplex_around
from ._own_scale import norm


class Optimistix(AbstractSteppingSolver):
    """An Optimistix minimiser, least-squares solver, root finder or fixed-point solver.

    Solvers of Optimistix may be given to bilevax as they are; wrap one in this to change
    the number of steps. What is solved:

    | solver | `Minimum` | `LeastSquares` | `Root`, `FixedPoint` |
    |---|---|---|---|
    | minimiser | `U` | `U` | half the squared norm of the residual |
    | least squares | `grad_x U` | `fn` | residual |
    | root finder | `grad_x U` | `grad_x U` | residual |
    | fixed point | refused | refused | `fn` (`FixedPoint` only) |

    The outcome is judged by the residual measured at the returned `x`: see `measure`.
    Optimistix' own verdict does not count, because several of its solvers say "successful"
    where they stall. Its numbers are for steps and values, and a gradient is not to be
    smaller than the default, 1e-6 in float64, because of them: the residual must meet the
    larger of that and the solver's `rtol`. Short steps are no proof of a small gradient
    either; where a solver leaves more, ask it for more, or say here what is enough.
    Of an equation the residual is judged, also where a minimiser has met its own
    stopping rule: a minimum of the squared residual need not be a root.

    Optimistix' solvers compute in JAX's default precision; `x` and what your function
    sees keep the dtype of `x0`.

    **Arguments:**

    - `solver`: the Optimistix solver.
    - `max_steps`: the most steps it may take; by default 1,000, of `bx.LBFGS`, whose steps
        cost a gradient each, 5,000.
    - `rtol`, `atol`: what the two-norm of the residual must meet, exactly as given; by
        default the solver's `rtol`, if not zero no less than 1e-6 in float64 and 1e-4 in float32,
        and its `atol`, translated from its own norm (the largest entry, for most) to the
        two-norm: times the root of the number of variables.
    - `options`: what Optimistix calls the options of a solver: `{"lower": 0.0, "upper":
        1.0}` for `optx.Bisection`, `{"jac": "bwd"}` for least squares, ...
    - `fallback`: the solver that goes on where this one has not met its tolerance, from
        its `x`, or from `x0` if the residual there is not ten times larger; its tolerance
        then counts. Rules that differentiate steps take the steps of `solver` alone.

    **Cost:** one gradient a step is counted for solvers that do not count themselves,
    plus one gradient and one Hessian product for the measurement.

    !!! example

        ```python
        import bilevax as bx, optimistix as optx

        inner_solver = bx.Optimistix(optx.BFGS(rtol=1e-6, atol=1e-6), max_steps=5_000)
        ```
    """

    stands_for = "solver"

    solver: optx.AbstractIterativeSolver
    max_steps: int
    rtol: float | None
    atol: float | None
    options: dict[str, Any]
    fallback: "Optimistix | None"

    def __init__(
        self,
        solver: optx.AbstractIterativeSolver,
        max_steps: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        options: dict[str, Any] | None = None,
        fallback: "optx.AbstractIterativeSolver | Optimistix | None" = None,
    ) -> None:
        if not isinstance(solver, optx.AbstractIterativeSolver):
            raise TypeError(
                "`Optimistix` wraps a solver of Optimistix such as optx.BFGS(...); got "
                f"{type(solver).__name__}."
            )
        usual: int = getattr(solver, "usual_max_steps", _MAX_STEPS)
        self.solver = solver
        self.max_steps = usual if max_steps is None else max_steps
        check_positive(self.max_steps, "max_steps")
        self.rtol = rtol
        self.atol = atol
        self.options = {} if options is None else as_arrays(dict(options))
        is_bare = isinstance(fallback, optx.AbstractIterativeSolver)
        self.fallback = Optimistix(fallback) if is_bare else fallback

    @property
    def algorithm(self) -> optx.AbstractIterativeSolver:
        return self.solver

    @property
    def is_fixed_length(self) -> bool:
        return False

    def with_rtol(self, rtol: Scalar) -> "Optimistix | None":
        first = self._with_own_rtol(rtol)
        if first is None or self.fallback is None:
            return first
        fallback = self.fallback.with_rtol(rtol)
        return first if fallback is None else eqx.tree_at(lambda s: s.fallback, first, fallback)

    def _with_own_rtol(self, rtol: Scalar) -> "Optimistix | None":
        if isinstance(self.solver, AbstractMeasuredMinimiser):
            return eqx.tree_at(_own_rtol, self, rtol, is_leaf=_is_none)
        if not hasattr(self.solver, "rtol"):
            return None
        # A tenth: these stop on their steps, and the residual is what counts.
        return eqx.tree_at(
            lambda s: (s.solver.rtol, s.rtol), self, (0.1 * rtol, rtol), is_leaf=_is_none
        )

    def factorised(self, max_steps: int) -> "Optimistix":
        choose = getattr(self.solver, "factorised", None)
        solver = None if choose is None else choose()
        if solver is None:
            return self
        max_steps = min(self.max_steps, max_steps)
        return dataclasses.replace(self, solver=solver, max_steps=max_steps)

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del condition, theta
        empty = getattr(self.solver, "empty_memory", None)
        return None if empty is None else empty(x0)

    def start(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> PyTree[Array]:
        del state  # pairs of another theta: for the adjoint system, not for this solve
        fn, args = self._problem(condition, x0, theta)
        y0, options = self._working(x0), self.options
        f_struct, aux_struct = eqx.filter_eval_shape(fn, y0, args)
        solver_state = self.solver.init(fn, y0, args, options, f_struct, aux_struct, _TAGS)
        if isinstance(self.solver, optx.NelderMead):
            simplex = simplex_around(self.solver, y0)
            solver_state = eqx.tree_at(lambda s: s.simplex, solver_state, simplex)
        dynamic, static = eqx.partition(solver_state, eqx.is_array)
        done, result = self.solver.terminate(fn, y0, args, options, solver_state, _TAGS)
        carry = (x0, dynamic, jnp.asarray(done), result)
        return (*jax.tree_util.tree_map(jnp.asarray, carry), Opaque(static))

    def step(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> PyTree[Array]:
        x, dynamic, _, _, static = carry
        fn, args = self._problem(condition, x, theta)
        state = eqx.combine(dynamic, static.value)
        y, options = self._working(x), self.options
        solver = self._stricter(condition, x)
        new_y, new_state, _ = solver.step(fn, y, args, options, state, _TAGS)
        if isinstance(self.solver, optx.NelderMead):
            new_y, new_state = ranked(new_state)
        done, result = self.solver.terminate(fn, y, args, options, new_state, _TAGS)
        new_x = tree_astype(new_y, tree_dtype(x))
        if not isinstance(self.solver, AbstractMeasuredMinimiser):  # these look themselves
            result = optx.RESULTS.where(tree_all_finite(new_x), result, optx.RESULTS.nonfinite)
        new_dynamic, _ = eqx.partition(new_state, eqx.is_array)
        return new_x, new_dynamic, jnp.asarray(done), result, static

    def is_done(self, carry: PyTree[Array]) -> Array:
        _, _, done, result, _ = carry
        return done | (result != optx.RESULTS.successful)

    def finish(self, condition: AbstractCondition, carry: PyTree[Array]) -> tuple[PyTree, PyTree]:
        x, _ = self._postprocess(condition, None, carry)
        return x, self._memory(carry)

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        solution, memory = self._solve(condition, x0, theta, state)
        if self.fallback is None:
            return solution, memory
        return go_on(self.fallback, condition, x0, theta, solution), memory

    def _solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        carry, count = run(self, condition, theta, self.start(condition, x0, theta, state))
        result = carry[3]
        x, stats = self._postprocess(condition, theta, carry)
        is_own = isinstance(self.solver, AbstractMeasuredMinimiser)
        if not is_own or condition.objective is None:
            counts = Counts(gradients=count)
            if is_own:
                counts = Counts(stats["num_gradients"], stats["num_hessian_products"])
            rtol, atol = self._rtol(x, is_own), self._atol(x)
            solution = measure(condition, x, x0, theta, rtol, atol, count, counts)
            return solution, self._memory(carry)
        outcome = _outcome(result, stats)
        outcome = flag_kink(condition, x, x0, theta, stats["scale"], outcome)
        solution = InnerSolution(
            x=x,
            residual=stats["residual"],
            tolerance=stats["tolerance"],
            num_steps=count,
            result=outcome,
            counts=Counts(stats["num_gradients"], stats["num_hessian_products"]),
        )
        return solution, self._memory(carry)

    def _stricter(self, condition: AbstractCondition, x: PyTree) -> optx.AbstractIterativeSolver:
        """`solver`; a minimiser of a squared residual `F`, which sees `F_x' F`, asks for a tenth.

        Where it stops, `F` itself is to be small.
        """
        solver = self.solver
        if not isinstance(solver, AbstractMeasuredMinimiser) or condition.objective is not None:
            return solver
        asked: Any = solver.rtol
        rtol = default_rtol(x) if asked is None else asked
        return eqx.tree_at(lambda s: s.rtol, solver, 0.1 * rtol, is_leaf=_is_none)

    def _rtol(self, x: PyTree, is_own: bool) -> Any:
        """What the residual may be relative to its terms; `solver.rtol` is of steps and values."""
        if self.rtol is not None:
            return self.rtol
        if is_own:
            return self.solver.rtol
        rtol = jnp.asarray(self.solver.rtol)
        # Zero is no habit: its user wants the absolute tolerance alone.
        return jnp.where(rtol > 0, jnp.maximum(rtol, default_rtol(x)), 0)

    def _atol(self, x: PyTree) -> Any:
        """What the residual may be in the two-norm, `solver.atol` being in the solver's own."""
        if self.atol is not None:
            return self.atol
        # All norms of one number are the same; those of `NewtonCG` and `LBFGS` are the two-norm.
        if tree_size(x) <= 1 or isinstance(self.solver, AbstractMeasuredMinimiser):
            return self.solver.atol
        ones = jax.tree_util.tree_map(jnp.ones_like, x)
        return self.solver.atol * tree_norm(ones) / self.solver.norm(ones)

    def _problem(self, condition: AbstractCondition, x: PyTree, theta: PyTree) -> tuple:
        """What Optimistix solves, and its arguments."""
        return _function_for(self.solver, condition), (condition, theta, tree_dtype(x))

    def _working(self, x: PyTree) -> PyTree:
        """`x` in JAX's default precision, in which all of Optimistix' solvers are at home."""
        if isinstance(self.solver, AbstractMeasuredMinimiser):
            return x
        return tree_astype(x, jnp.zeros(()).dtype)

    def _memory(self, carry: PyTree[Array]) -> PyTree:
        """What a preconditioner of the adjoint system can use: the pairs of `LBFGS`."""
        return carry[1].history if hasattr(self.solver, "empty_memory") else None

    def _postprocess(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> tuple[PyTree, dict[str, Any]]:
        x, dynamic, _, result, static = carry
        fn, args = self._problem(condition, x, theta)
        state = eqx.combine(dynamic, static.value)
        y, _, stats = self.solver.postprocess(
            fn, self._working(x), None, args, self.options, state, _TAGS, result
        )
        return tree_astype(y, tree_dtype(x)), stats


def go_on(
    solver: Optimistix,
    condition: AbstractCondition,
    x0: PyTree,
    theta: PyTree,
    first: InnerSolution,
) -> InnerSolution:
    """`first` or, where it is no solution, what `solver` finds from there or from `x0`."""

    def second(_: tuple) -> tuple[Array, InnerSolution]:
        before = norm(condition.residual(x0, theta))
        # A slow iteration is gone on with; a cycle, or one that has run away, is left.
        start = tree_where(first.residual < 0.1 * before, first.x, x0)
        found, _ = solver.solve(condition, start, theta, solver.init(condition, start, theta))
        is_better = (found.result == RESULTS.successful) | ~(found.residual >= first.residual)
        is_better &= found.result != RESULTS.nonfinite
        kept = tree_where(is_better, found, first)
        spent = (first.num_steps + found.num_steps, first.counts + found.counts)
        spent = (spent[0], spent[1] + Counts(gradients=1))
        return jnp.zeros((), bool), eqx.tree_at(lambda s: (s.num_steps, s.counts), kept, spent)

    # A loop of one turn or none, and not a branch, of which a batch would always take both.
    is_needed = first.result != RESULTS.successful
    return jax.lax.while_loop(lambda s: s[0], second, (is_needed, first))[1]


_TAGS: frozenset[object] = frozenset()
_MAX_STEPS = 1_000
# More than `measure` takes for rounding, because the search has found nothing better.
_GIVEN_UP = 10


def _own_rtol(solver: Optimistix) -> Any:
    return solver.solver.rtol


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _outcome(result: Any, stats: dict[str, Any]) -> RESULTS:
    """The verdict of a solver that measures its own residual (`NewtonCG`, `LBFGS`).

    A line search that gives up has stalled only if nothing but rounding errors is left.
    """
    residual, eps = stats["residual"], float(jnp.finfo(stats["residual"].dtype).eps)
    is_floor = (result == optx.RESULTS.stagnation) & (
        residual <= _GIVEN_UP * ROUNDING * eps * stats["scale"]
    )
    out = RESULTS.where(is_floor, RESULTS.stalled, RESULTS.inner_not_converged)
    out = RESULTS.where(residual <= stats["tolerance"], RESULTS.successful, out)
    return RESULTS.where(result == optx.RESULTS.nonfinite, RESULTS.nonfinite, out)


# Functions of (y, (condition, theta, dtype)), as Optimistix wants them: global, so that no
# array hides in a closure and a new condition of the same shape compiles nothing. `y` may be
# of another precision than x, whose `dtype` is the one the user's functions see.


def _objective(y: PyTree, args: tuple) -> tuple[Array, None]:
    condition, theta, dtype = args
    value = condition.objective(tree_astype(y, dtype), theta)
    return value.astype(tree_dtype(y)), None


def _squared_residual(y: PyTree, args: tuple) -> tuple[Array, None]:
    residual, _ = _residual(y, args)
    return 0.5 * tree_dot(residual, residual), None


def _residual(y: PyTree, args: tuple) -> tuple[PyTree, None]:
    condition, theta, dtype = args
    residual = condition.residual(tree_astype(y, dtype), theta)
    return tree_astype(residual, tree_dtype(y)), None


def _residuals(y: PyTree, args: tuple) -> tuple[PyTree, None]:
    condition, theta, dtype = args
    return tree_astype(condition.residuals(tree_astype(y, dtype), theta), tree_dtype(y)), None


def _iteration(y: PyTree, args: tuple) -> tuple[PyTree, None]:
    condition, theta, dtype = args
    return tree_astype(condition.iteration(tree_astype(y, dtype), theta), tree_dtype(y)), None


def _function_for(
    solver: optx.AbstractIterativeSolver, condition: AbstractCondition
) -> Callable[[PyTree, tuple], tuple[PyTree, None]]:
    """What `solver` is to solve for `condition`: the table of the class docstring."""
    if isinstance(solver, optx.AbstractMinimiser):
        return _objective if condition.objective is not None else _squared_residual
    if isinstance(solver, optx.AbstractLeastSquaresSolver):
        return _residuals if condition.residuals is not None else _residual
    if isinstance(solver, optx.AbstractFixedPointSolver):
        if condition.iteration is None:
            raise TypeError(
                f"{type(solver).__name__} solves fixed points, but the inner problem is a "
                f"{type(condition).__name__}. Use a minimiser such as bx.NewtonCG() or a root "
                "finder such as optx.Newton(...), or state the inner problem as bx.FixedPoint."
            )
        return _iteration
    return _residual
