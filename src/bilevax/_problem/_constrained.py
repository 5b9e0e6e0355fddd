"""Minima under equations and inequalities, by their KKT conditions."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._linear import GMRES, LU
from .._linear._in_turn import factorise
from .._linear._lu import pivoted
from .._results import RESULTS
from .._tree import (
    largest_entry,
    stop_gradient,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_where,
)
from ._condition import AbstractCondition, call, check_scalar

# Of so many variables and multipliers dense matrices are formed and factorised.
MOST_DENSE = 2_000
# Of the norm of the scaled KKT matrix: singular values below are of dependent constraints.
_DEPENDENT = 1e-3
# Of a unit vector, what may lie outside the multipliers where they alone are free.
_THEIRS = 1e-3
_GAUSS_NEWTON_STEPS = 20
_REFINEMENTS = 3
_SMALL = 1e-10
_STUCK = 1e-3
# Of the error of x, what the residual says where nothing else does.
_FAR = 100.0


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
    constraints cannot be made smaller near x. `negative_curvature` at a saddle or a maximum along
    the active constraints.

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

    def default_linear_solver(self, x: PyTree) -> lx.AbstractLinearSolver:
        return LU() if tree_size(x) <= MOST_DENSE else GMRES()

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

    def refined(self, unknown: PrimalDual, theta: PyTree) -> PrimalDual:
        """After Newton's method on what is active, while that makes the residual smaller.

        An interior point leaves 1e-10 of what is zero: the bounds that hold and the multipliers
        of the constraints that do not.
        """
        if not 0 < tree_size(unknown) <= MOST_DENSE:
            return unknown
        rounding = 100 * float(jnp.finfo(tree_dtype(unknown)).eps) * (1 + tree_norm(unknown))

        def is_running(s: _Refined) -> Bool[Array, ""]:
            is_open = (s.num_steps == 0) | ~(s.residual <= rounding)  # the first is exact zeros'
            return (s.num_steps < _REFINEMENTS) & (s.residual < s.before) & is_open

        def step(s: _Refined) -> _Refined:
            new = jtu.tree_map(jnp.add, s.unknown, self.newton_step(s.unknown, theta))
            left = tree_norm(self.residual(new, theta))
            is_better = left < s.residual
            chosen = tree_where(is_better, new, s.unknown)
            left = jnp.where(is_better, left, s.residual)
            return _Refined(chosen, left, s.residual, s.num_steps + 1)

        first = tree_norm(self.residual(unknown, theta))
        start = _Refined(unknown, first, jnp.full_like(first, jnp.inf), jnp.zeros((), jnp.int32))
        last = jax.lax.while_loop(is_running, step, start)
        return self._without_rounding(last.unknown, theta)

    def _without_rounding(self, unknown: PrimalDual, theta: PyTree) -> PrimalDual:
        """Multipliers that are zero up to rounding are zero, as those of inactive constraints."""
        if self.inequality is None:
            return unknown
        flat, back = jax.flatten_util.ravel_pytree(unknown.x)
        gradient = jax.grad(lambda x: self(back(x), theta))
        along, bent = jax.jvp(gradient, (flat,), (flat,))
        rows = largest_entry(jax.jacfwd(lambda x: self.constraints(back(x), theta)[1])(flat))
        size = jnp.maximum(jnp.linalg.norm(along), jnp.linalg.norm(bent))
        least = 100 * float(jnp.finfo(flat.dtype).eps) * size / jnp.where(rows > 0, rows, 1)
        kept = jtu.tree_map(lambda m: jnp.where(m > least, m, 0), unknown.inequality)
        return unknown._replace(inequality=kept)

    def magnitude(self, unknown: PrimalDual) -> PrimalDual:
        # What a solver leaves of a multiplier that is zero is small beside the others.
        largest = largest_entry(unknown.inequality)
        others = jtu.tree_map(lambda m: jnp.maximum(jnp.abs(m), largest), unknown.inequality)
        return unknown._replace(inequality=others)

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
        """The values of the equations, and of the inequalities, as vectors in the dtype of x."""
        fns, dtype = (self.equality, self.inequality), tree_dtype(x)
        values = [() if fn is None else self._of(fn, x, theta) for fn in fns]
        equal, less = (jax.flatten_util.ravel_pytree(value)[0].astype(dtype) for value in values)
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
        sums = self._sums(x, theta)
        if tree_size(x) > MOST_DENSE:
            is_near = is_solved & self._is_near(x, sums, _FAR * residual)
            return RESULTS.where(is_near, RESULTS.at_kink, RESULTS.successful)

        # Under `vmap` all that is not a loop is computed for every element, solved or not.
        step, is_dependent, is_saddle = self._newton(x, theta)
        is_near = self._is_near(x, sums, tree_norm(step))
        is_infeasible = self._is_contradictory(x, theta, 10 * tolerance, ~is_solved)
        found = (*(is_solved & a for a in (is_near, is_dependent, is_saddle)), is_infeasible)
        result = RESULTS.successful
        outcomes = (
            RESULTS.at_kink,
            RESULTS.dependent_constraints,
            RESULTS.negative_curvature,
            RESULTS.infeasible,
        )
        for is_found, outcome in zip(found, outcomes, strict=True):
            result = RESULTS.where(is_found, outcome, result)
        return result

    def _is_near(self, x: PrimalDual, sums: PyTree, error: Scalar) -> Bool[Array, ""]:
        """Whether an error of x and its multipliers may change what is active."""
        margins = [jnp.min(jnp.abs(s), initial=jnp.inf) for s in jtu.tree_leaves(sums)]
        if not margins:
            return jnp.array(False)
        rounding = 100 * float(jnp.finfo(tree_dtype(x)).eps) * tree_norm((x, sums))
        return ~(jnp.min(jnp.stack(margins)) > 2 * error + rounding)

    def newton_step(self, x: PrimalDual, theta: PyTree) -> PrimalDual:
        """From x to the solution for the constraints that are active, by a dense solve."""
        matrix, value, back = self._kkt(x, theta)
        return back(factorise(lambda a, b: -pivoted(a).solve(b), matrix, value))

    def _newton(self, x: PrimalDual, theta: PyTree) -> tuple[PrimalDual, Array, Array]:
        """The Newton step; whether active constraints are dependent; whether x is no minimum."""
        matrix, value, back = self._kkt(x, theta)
        size = tree_size(x.x)

        def look(matrix: Array, value: Array) -> tuple[Array, Scalar, Array, Array]:
            at = pivoted(matrix)
            return -at.solve(value), *at.weakest(), _is_bent_down(matrix, size)

        step, weakest, direction, is_saddle = factorise(look, matrix, value)
        # A direction of the multipliers alone along which the equations do not change.
        is_theirs = jnp.linalg.norm(direction[:size]) <= _THEIRS
        limit = _DEPENDENT * float(jnp.finfo(step.dtype).eps) ** 0.25
        return back(step), ~(weakest > limit) & is_theirs, is_saddle

    def _kkt(self, x: PrimalDual, theta: PyTree) -> tuple[Array, Array, Callable]:
        """The derivative of the equations of the active constraints, dense, and their value."""
        flat, back = jax.flatten_util.ravel_pytree(x)
        equation = self.equation_at(x, theta)

        def value(flat: Array) -> Array:
            return jax.flatten_util.ravel_pytree(equation(back(flat), theta))[0]

        return jax.jacfwd(value)(flat), value(flat), back

    def _is_contradictory(
        self, x: PrimalDual, theta: PyTree, allowed: Scalar, is_asked: Bool[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether Gauss and Newton's method ends at a violation that no direction makes smaller."""
        flat, back = jax.flatten_util.ravel_pytree(x.x)

        def violation(flat: Array) -> Array:
            equal, less = self.constraints(back(flat), theta)
            return jnp.concatenate([equal, jnp.maximum(less, 0)])

        def step(s: _Violation) -> _Violation:
            left, rows = violation(s.x), jax.jacfwd(violation)(s.x)
            size, along = jnp.linalg.norm(left), rows.T @ left
            is_stuck = jnp.linalg.norm(along) <= _STUCK * jnp.linalg.norm(rows) * size
            gram = rows.T @ rows
            small = _SMALL * jnp.trace(gram) + float(jnp.finfo(gram.dtype).tiny)
            damped = gram + small * jnp.eye(flat.size, dtype=gram.dtype)
            move = factorise(_solve_definite, damped, along)
            return _Violation(s.x - move, size, is_stuck, s.num_steps + 1)

        zero = jnp.zeros((), jnp.int32)
        first = _Violation(flat, jnp.zeros_like(allowed), jnp.array(False), zero)
        is_running = lambda s: is_asked & (s.num_steps < _GAUSS_NEWTON_STEPS)  # noqa: E731
        last = jax.lax.while_loop(is_running, step, first)
        return last.is_stuck & (last.size > allowed)


class _Refined(NamedTuple):
    unknown: PrimalDual
    residual: Scalar
    before: Scalar
    num_steps: Array


class _Violation(NamedTuple):
    x: Array
    size: Scalar
    is_stuck: Bool[Array, ""]
    num_steps: Array


def _is_bent_down(kkt: Array, size: int) -> Bool[Array, ""]:
    """Whether the Hessian is negative along the active constraints, clearly.

    `H + rho C'C` is positive definite for all large rho where it is not, and for none where it is
    (Debreu, "Definite and semidefinite quadratic forms", 1952).
    """
    eps = float(jnp.finfo(kkt.dtype).eps)
    hessian, rows = 0.5 * (kkt[:size, :size] + kkt[:size, :size].T), kkt[size:, :size]
    diagonal = jnp.abs(jnp.diagonal(hessian))
    units = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))
    hessian, rows = hessian * jnp.outer(units, units), rows * units[None]
    largest = jnp.max(jnp.abs(hessian), initial=0)
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    rows /= jnp.where(lengths > 0, lengths, 1)
    rho = eps**-0.4
    shift = 10 * size * eps * rho * jnp.eye(size, dtype=kkt.dtype)
    total = hessian / jnp.where(largest > 0, largest, 1) + rho * rows.T @ rows + shift
    factor = jax.lax.linalg.cholesky(total, symmetrize_input=False)
    return jnp.isnan(factor[-1, -1]) & (largest > 0)


def _solve_definite(matrix: Array, b: Array) -> Array:
    return jax.scipy.linalg.solve(matrix, b, assume_a="pos")


def _x_of(x: PyTree) -> PyTree:
    return x.x if isinstance(x, PrimalDual) else x


def _complementarity(multiplier: Array, value: Array) -> Array:
    return multiplier - jnp.maximum(multiplier + value, 0)
