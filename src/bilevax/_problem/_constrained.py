"""Minima under equations and inequalities, by their KKT conditions."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._results import RESULTS
from .._tree import largest_entry, stop_gradient, tree_dot, tree_dtype, tree_norm, tree_size
from ._condition import AbstractCondition, call, check_scalar

# Beyond this many constraints or entries their dependence is not looked for.
_MOST_DENSE = 2_000
# Of the largest singular value of the constraints' derivative: dependent are those below.
_DEPENDENT = 1e-3
_GAUSS_NEWTON_STEPS = 20


class PrimalDual(NamedTuple):
    """The unknown of a constrained minimum."""

    x: PyTree[Array]
    equality: PyTree[Array] | None = None  # a multiplier for each equation
    inequality: PyTree[Array] | None = None  # and for each inequality, not negative


class ConstrainedMinimum(AbstractCondition):
    """`x*(theta)` minimises `fn(x, theta)` where `equality = 0` and `inequality <= 0`.

    **Arguments:**

    - `fn`: `(x, theta)` or, with data, `(x, theta, data)` to a scalar.
    - `equality`, `inequality`: called like `fn`, to an array or a pytree of arrays; at least one.
    - `data`: as in `Minimum`.
    - `with_multipliers`: the outer objective is called with the whole
        `PrimalDual(x, equality, inequality)` instead of x, and `bx.argmin` returns it.

    The unknown is x with a multiplier for each constraint. They are the zero of

        grad_x (fn + nu' c + mu' g),    c(x, theta),    mu - max(mu + g(x, theta), 0),

    and move as the solution of the symmetric, indefinite system of the constraints that are
    active, `mu + g > 0`. `x0` is an x, from which the multipliers start at zero, or a
    `PrimalDual`. By default `bx.InteriorPoint` solves for both or, of
    equations alone, Newton's method. Any solver that returns a primal and dual pair serves as
    `bx.External(fn)` or `bx.Traceable(fn)`: `fn` returns a `PrimalDual`.

    **Outcomes:** `at_kink` where a constraint is weakly active (`mu` and `g` both zero): the
    derivative is one-sided. `dependent_constraints` where the derivatives of the active ones are
    dependent, so that there is no single multiplier. `infeasible` where the violation of the
    constraints cannot be made smaller near x.

    **Exact when** the pair is the solution, the active constraints are independent, and none
    is weakly active. `Estimate.x` and `solution.x` are the pair, which starts the next solve.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        nearest = bx.ConstrainedMinimum(
            lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2),
            equality=lambda x, theta: jnp.sum(x) - 1.0,
            inequality=lambda x, theta: -x,
        )
        x = bx.argmin(nearest)(jnp.full(2, 0.5), jnp.array([0.9, 0.4]))
        ```

    Reference: Amos and Kolter, "OptNet: differentiable optimization as a layer in neural
    networks", 2017, eq. (6); here for the active constraints alone.
    """

    fn: Callable
    equality: Callable | None = None
    inequality: Callable | None = None
    data: PyTree = None
    with_multipliers: bool = eqx.field(default=False, static=True)
    is_symmetric: ClassVar[bool] = False  # it is, but not definite

    def __check_init__(self) -> None:
        if self.equality is None and self.inequality is None:
            raise TypeError(
                "bx.ConstrainedMinimum(fn, equality=..., inequality=...) needs a constraint; "
                "without one it is bx.Minimum(fn)."
            )
        for name in ("equality", "inequality"):
            value = getattr(self, name)
            if not (value is None or callable(value)):
                raise TypeError(
                    f"`{name}` must be a function (x, theta) that returns arrays; got "
                    f"{type(value).__name__}."
                )

    # ---- the unknown

    def unknown(self, x0: PyTree, theta: PyTree) -> PrimalDual:
        if isinstance(x0, PrimalDual):
            return x0
        x = jtu.tree_map(jnp.asarray, x0)

        def zeros(fn: Callable | None) -> PyTree:
            if fn is None:
                return None
            shapes = eqx.filter_eval_shape(lambda: self._of(fn, x, theta))
            return jtu.tree_map(lambda s: jnp.zeros(s.shape, tree_dtype(x)), shapes)

        return PrimalDual(x, zeros(self.equality), zeros(self.inequality))

    def primal(self, unknown: PyTree) -> PyTree:
        is_pair = isinstance(unknown, PrimalDual) and not self.with_multipliers
        return unknown.x if is_pair else unknown

    def map_functions(self, wrap: Callable[[Callable], Callable]) -> "ConstrainedMinimum":
        def wrapped(fn: Callable | None) -> Callable | None:
            return None if fn is None else wrap(fn)

        return dataclasses.replace(
            self,
            fn=wrap(self.fn),
            equality=wrapped(self.equality),
            inequality=wrapped(self.inequality),
        )

    def __call__(self, x: PyTree, theta: PyTree) -> Scalar:
        return call(self.fn, "inner", _x_of(x), theta, self.data)

    def check_output(self, out: Any, x: PyTree) -> None:
        del x
        check_scalar(out, "inner")

    @property
    def has_inequalities(self) -> bool:
        return self.inequality is not None

    def constraints(self, x: PyTree, theta: PyTree) -> tuple[Array, Array]:
        """The values of the equations, and of the inequalities, as vectors."""
        fns = (self.equality, self.inequality)
        values = [() if fn is None else self._of(fn, x, theta) for fn in fns]
        equal, less = (jax.flatten_util.ravel_pytree(value)[0] for value in values)
        return equal, less

    # ---- the equations

    def residual(self, x: PyTree, theta: PyTree) -> PrimalDual:
        return self._equations(x, theta, x.inequality, _complementarity)

    def equation_at(self, x: PyTree, theta: PyTree) -> Callable[[PyTree, PyTree], PrimalDual]:
        is_active = jtu.tree_map(lambda m: m > 0, stop_gradient(self._sums(x, theta)))

        def equation(x: PrimalDual, theta: PyTree) -> PrimalDual:
            kept = jtu.tree_map(lambda a, m: jnp.where(a, m, 0), is_active, x.inequality)

            def row(m: Array, g: Array, is_active: Array) -> Array:
                return jnp.where(is_active, g, m)

            return self._equations(x, theta, kept, row, is_active)

        return equation

    def _equations(
        self, x: PrimalDual, theta: PyTree, multipliers: PyTree, row: Callable, *more: PyTree
    ) -> PrimalDual:
        def lagrangian(primal: PyTree) -> Scalar:
            value = self(primal, theta)
            for fn, factors in ((self.equality, x.equality), (self.inequality, multipliers)):
                if fn is not None:
                    value += tree_dot(factors, self._of(fn, primal, theta)).astype(value.dtype)
            return value

        equality = None if self.equality is None else self._of(self.equality, x.x, theta)
        inequality = None
        if self.inequality is not None:
            values = self._of(self.inequality, x.x, theta)
            inequality = jtu.tree_map(row, x.inequality, values, *more)
        return PrimalDual(jax.grad(lagrangian)(x.x), equality, inequality)

    def _of(self, fn: Callable, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return call(fn, "inner", x, theta, self.data)

    def _sums(self, x: PrimalDual, theta: PyTree) -> PyTree[Array]:
        """`mu + g`, positive for active inequalities; `None` without any."""
        if self.inequality is None:
            return None
        return jtu.tree_map(jnp.add, x.inequality, self._of(self.inequality, x.x, theta))

    # ---- what else there is to say

    def verdict(self, x: PyTree, theta: PyTree, residual: Scalar, tolerance: Scalar) -> RESULTS:
        is_solved = residual <= tolerance
        result = RESULTS.successful
        sums = self._sums(x, theta)
        if sums is not None:
            margins = [jnp.min(jnp.abs(s), initial=jnp.inf) for s in jtu.tree_leaves(sums)]
            margin = jnp.min(jnp.stack(margins))
            rounding = 100 * float(jnp.finfo(residual.dtype).eps) * tree_norm((x, sums))
            error = jax.lax.cond(
                is_solved, lambda: self._error(x, theta, residual), lambda: residual
            )
            is_near = is_solved & ~(margin > 2 * error + rounding)
            result = RESULTS.where(is_near, RESULTS.at_kink, result)
        flat, back = jax.flatten_util.ravel_pytree(x.x)

        def values(flat: Array) -> Array:
            parts = [part.astype(flat.dtype) for part in self.constraints(back(flat), theta)]
            return jnp.concatenate(parts)

        num_equal = tree_size(x.equality)
        num = num_equal + tree_size(x.inequality)
        if not 0 < max(num, flat.size) <= _MOST_DENSE:
            return result
        is_equality = jnp.arange(num) < num_equal
        # 1. at a solution: are the active constraints independent?
        is_active = is_equality
        if sums is not None:
            is_active |= jnp.pad(jax.flatten_util.ravel_pytree(sums)[0] > 0, (num_equal, 0))
        is_dependent = jax.lax.cond(
            is_solved, lambda: _are_dependent(jax.jacrev(values)(flat), is_active), _no
        )
        result = RESULTS.where(is_dependent, RESULTS.dependent_constraints, result)
        # 2. elsewhere: can they be met at all?
        is_infeasible = jax.lax.cond(
            is_solved, _no, lambda: _are_contradictory(values, flat, is_equality, 10 * tolerance)
        )
        return RESULTS.where(is_infeasible, RESULTS.infeasible, result)

    def _error(self, x: PrimalDual, theta: PyTree, residual: Scalar) -> Scalar:
        """Of x and its multipliers, by the length of a Newton step."""
        if tree_size(x) > _MOST_DENSE:
            return 100 * residual
        return tree_norm(self.newton_step(x, theta)).astype(residual.dtype)

    def newton_step(self, x: PrimalDual, theta: PyTree) -> PrimalDual:
        """From x to the solution for the constraints that are active, by a dense solve."""
        flat, back = jax.flatten_util.ravel_pytree(x)
        equation = self.equation_at(x, theta)

        def value(flat: Array) -> Array:
            return jax.flatten_util.ravel_pytree(equation(back(flat), theta))[0]

        return back(-jnp.linalg.solve(jax.jacfwd(value)(flat), value(flat)))


def _no() -> Bool[Array, ""]:
    return jnp.array(False)


def _are_dependent(rows: Array, is_active: Array) -> Bool[Array, ""]:
    """Whether the active rows are; the others are replaced by ones of their own."""
    scale = jnp.maximum(largest_entry(rows), float(jnp.finfo(rows.dtype).tiny))
    kept = jnp.where(is_active[:, None], rows, 0)
    own = jnp.diag(jnp.where(is_active, 0, scale))
    values = jnp.linalg.svd(jnp.concatenate([kept, own], axis=1), compute_uv=False)
    return values[-1] <= _DEPENDENT * float(jnp.finfo(rows.dtype).eps) ** 0.25 * values[0]


def _are_contradictory(
    values: Callable[[Array], Array], x: Array, is_equality: Array, allowed: Scalar
) -> Bool[Array, ""]:
    """Whether Gauss and Newton's method ends at a violation that no direction makes smaller."""

    def violation(x: Array) -> Array:
        found = values(x)
        return jnp.where(is_equality, found, jnp.maximum(found, 0))

    def step(_: Array, x: Array) -> Array:
        left, rows = violation(x), jax.jacfwd(violation)(x)
        return x - jnp.linalg.pinv(rows) @ left

    x = jax.lax.fori_loop(0, _GAUSS_NEWTON_STEPS, step, x)
    left, rows = violation(x), jax.jacfwd(violation)(x)
    size = jnp.linalg.norm(left)
    is_stuck = jnp.linalg.norm(rows.T @ left) <= 1e-3 * jnp.linalg.norm(rows) * size
    return is_stuck & (size > allowed)


def _x_of(x: PyTree) -> PyTree:
    return x.x if isinstance(x, PrimalDual) else x


def _complementarity(multiplier: Array, value: Array) -> Array:
    return multiplier - jnp.maximum(multiplier + value, 0)
