"""Proximal gradient to find the support, Newton's method on it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._linear import solve_linear
from .._problem import AbstractCondition
from .._problem._proximal import newton_solver, num_columns
from .._tree import default_rtol, tree_axpy, tree_norm, tree_where
from ._base import AbstractInnerSolver, Counts, InnerSolution, measure, residual_and_scale
from ._proximal_gradient import ProximalGradient
from ._proximal_steps import proximal

# Between two attempts of Newton's method.
_STEPS = 10
# Of an attempt: it is exact for a quadratic function and solves the rest again.
_CG_RTOL = 1e-3
# How often it is tried after the residual is small, and where there is nothing left to try.
_PATIENCE = 30
_FLOOR = 1e-3
# Of the tolerance, among the entries that are searched; and how often they are chosen anew.
_TIGHTER = 0.1
_SELECTIONS = 30
# Of a Newton step that leaves the piece.
_LENGTHS = (1.0, 0.3, 0.1)


class ProximalNewton(AbstractInnerSolver):
    """The default for `bx.ProximalMinimum`: proximal gradient steps, and Newton's on the support.

    Accelerated proximal gradient (see `bx.ProximalGradient`) finds the smooth piece on which the
    solution lies: the support, the bounds that hold, the groups. Every ten steps Newton's method
    is tried on the piece, by a factorisation of at most 256 variables or conjugate gradients,
    and taken where it halves the residual: for a quadratic `fn` one such step is the solution, once
    the piece is right. Where it leads off the piece, shorter ones are tried, projected. For a
    box this is a projected Newton method. Where an array of 1,024 entries or more has an `L1`,
    `WeightedL1` or `ElasticNet` penalty and `fn` sees it through products alone (`features @ x`),
    the search is among the entries of x and those that violate their conditions most, by their
    columns; the adjoint system then is of these columns, too. Terms without pieces (`Nuclear`,
    `Own`) get the proximal steps alone.

    **Arguments:**

    - `rtol`, `atol`: stop when the norm of the residual (see `bx.ProximalMinimum`) is below
        `rtol` times that of its terms plus `atol`; `rtol` is 1e-6 in float64 and 1e-4 in
        float32 by default.
    - `max_steps`: the most proximal steps.

    **Cost:** a gradient and a value a proximal step; an attempt up to 200 Hessian products.
    Among columns, a gradient each time they are chosen anew: a handful.

    **Exact when** it has converged; quadratically once the piece is found.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.ProximalNewton(rtol=1e-10)
        ```

    Reference: Lee, Sun and Saunders, "Proximal Newton-type methods for minimizing composite
    functions", 2014, for the idea; Bareilles, Iutzeler and Malick, "Newton acceleration on
    manifolds identified by proximal gradient methods", 2023; Massias, Gramfort and Salmon,
    "Celer: a fast solver for the lasso with dual extrapolation", 2018, for the working sets.
    """

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    max_steps: int = 10_000

    def __check_init__(self) -> None:
        check_tolerance("ProximalNewton", rtol=self.rtol, atol=self.atol)
        check_count("ProximalNewton", max_steps=self.max_steps)

    def with_rtol(self, rtol: Scalar) -> "ProximalNewton":
        return eqx.tree_at(lambda s: s.rtol, self, rtol, is_leaf=lambda leaf: leaf is None)

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del x0, theta
        proximal(condition, type(self).__name__)

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        del state
        at: Any = proximal(condition, type(self).__name__).with_step_at(x0, theta)
        rtol = default_rtol(x0) if self.rtol is None else self.rtol
        if at.predictors(x0, theta) is None:
            last = self._search(at, x0, theta, rtol)
        else:
            last = self._among_columns(at, x0, theta, rtol)
        counts = Counts(gradients=2 * last.num_steps, hessian=last.num_products)
        found = measure(at, last.x, x0, theta, rtol, self.atol, last.num_steps, counts)
        return found, None

    def _among_columns(self, at: Any, x0: Array, theta: PyTree, rtol: Scalar | float) -> "_Found":
        """The search among the entries that matter: those of x, and where it is violated most.

        They are a fixed number, most of them zero. Where x has as many, all are searched.
        """
        most = num_columns(x0)

        def is_solved(s: _Selected) -> Bool[Array, ""]:
            # What is left is compared with the tolerance of those that have been searched.
            return s.found.is_done & (tree_norm(s.left) <= s.found.tolerance)

        def is_running(s: _Selected) -> Bool[Array, ""]:
            has_place = jnp.sum(s.found.x != 0) < most
            return ~is_solved(s) & has_place & (s.num_selections < _SELECTIONS)

        def body(s: _Selected) -> _Selected:
            x = s.found.x
            _, index = jax.lax.top_k(jnp.where(x != 0, jnp.inf, jnp.abs(s.left)), most)
            few = at.among(x, theta, index)
            inside = self._search(few, x[index], theta, _TIGHTER * rtol)
            x = jnp.zeros_like(x0).at[index].set(inside.x)
            found = inside._replace(
                x=x,
                tolerance=inside.tolerance / _TIGHTER,
                num_steps=s.found.num_steps + inside.num_steps,
                num_products=s.found.num_products + inside.num_products,
            )
            return _Selected(found, at.residual(x, theta), s.num_selections + 1)

        zero = jnp.zeros((), jnp.int32)
        first = _Found(x0, jnp.zeros_like(tree_norm(x0)), zero, zero, jnp.array(False))
        start = _Selected(first, at.residual(x0, theta), zero)
        last = jax.lax.while_loop(is_running, body, start)
        return jax.lax.cond(
            is_solved(last),
            lambda: last.found,
            lambda: self._search(at, last.found.x, theta, rtol),
        )

    def _search(self, at: Any, x0: PyTree, theta: PyTree, rtol: Scalar | float) -> "_Found":
        steps = ProximalGradient(num_steps=_STEPS)
        zero, none = jnp.zeros((), jnp.int32), jnp.zeros_like(tree_norm(x0))
        first = _State(
            steps.start(at, x0, theta, None),
            none,
            none,
            jnp.array(False),
            zero,
            zero - 1,
            zero,
            zero,
        )

        def is_running(s: _State) -> Bool[Array, ""]:
            return ~s.is_done & (s.num_steps < self.max_steps) & jnp.isfinite(s.residual)

        def advance(s: _State) -> _State:
            # 1. proximal steps
            carry = jax.lax.fori_loop(0, _STEPS, lambda _, c: steps.step(at, theta, c), s.carry)
            x, step = carry[0], carry[3]
            residual = tree_norm(at.residual_of_step(x, theta, step))
            num_products = s.num_products
            # 2. Newton's method, where the piece has settled
            num_free, is_settled = s.num_free, jnp.array(not at.nonsmooth.has_pieces)
            if at.nonsmooth.has_pieces:
                num_free = at.piece(x, theta, step).num_free
                is_wanted = (num_free == s.num_free) & (num_free > 0)
                no = jnp.array(False)
                found = jax.lax.cond(
                    is_wanted,
                    lambda: _newton(at, x, theta, step, residual),
                    lambda: _Attempt(x, residual, zero, no, no),
                )
                num_products += found.num_products
                restarted = (found.x, found.x, jnp.ones_like(carry[2]), *carry[3:])
                carry = tree_where(found.is_better, restarted, carry)
                x, residual, is_settled = found.x, found.residual, found.is_settled
            # 3. not before Newton's method agrees, with patience
            tolerance = self.atol + rtol * residual_and_scale(at, x, x0, theta)[1]
            is_small = residual <= tolerance
            is_settled |= residual <= _FLOOR * tolerance
            return _State(
                carry,
                residual,
                tolerance,
                is_small & (is_settled | (s.num_small >= _PATIENCE)),
                s.num_small + is_small.astype(jnp.int32),
                num_free,
                s.num_steps + _STEPS,
                num_products,
            )

        last = jax.lax.while_loop(is_running, advance, first)
        return _Found(
            last.carry[0], last.tolerance, last.num_steps, last.num_products, last.is_done
        )


class _Found(NamedTuple):
    x: PyTree
    tolerance: Scalar
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    is_done: Bool[Array, ""]


class _Selected(NamedTuple):
    found: _Found
    left: Array  # the residual, of all entries
    num_selections: Int[Array, ""]


class _State(NamedTuple):
    carry: tuple  # of the proximal gradient
    residual: Scalar
    tolerance: Scalar
    is_done: Bool[Array, ""]
    num_small: Int[Array, ""]
    num_free: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]


class _Attempt(NamedTuple):
    x: PyTree
    residual: Scalar
    num_products: Int[Array, ""]
    is_better: Bool[Array, ""]  # than the x before
    is_settled: Bool[Array, ""]  # on its piece, where the residual has halved


def _newton(at: Any, x: PyTree, theta: PyTree, step: Scalar, residual: Scalar) -> _Attempt:
    """A Newton step on the piece of x, if that halves the residual.

    Or the best of a few points on the way, each after a proximal step, if that lowers the
    objective: there many entries may leave the piece at once.
    """
    piece = at.piece(x, theta, step)
    equation = at.equation_on(piece)
    value, product = jax.linearize(lambda x: equation(x, theta), x)
    found = solve_linear(newton_solver(x, _CG_RTOL), product, value)

    def ahead(length: Scalar) -> PyTree:
        return at.placed(piece, tree_axpy(-length, found.value, x), theta)

    def beyond(length: Scalar) -> PyTree:
        return at.proximal_step(at.forward(ahead(length), theta, step), theta, step)

    whole = ahead(jnp.ones_like(residual))
    new = tree_norm(at.residual_of_step(whole, theta, step))
    is_settled = new < 0.5 * residual
    lengths = jnp.asarray(_LENGTHS, residual.dtype)
    values = jax.lax.map(lambda length: at.value(beyond(length), theta), lengths)
    best = jnp.nanargmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    now = at.value(x, theta)
    rounding = 10 * float(jnp.finfo(now.dtype).eps) * jnp.abs(now)
    is_lower = ~is_settled & (values[best] < now - rounding)
    chosen = tree_where(is_lower, beyond(lengths[best]), tree_where(is_settled, whole, x))
    left = tree_norm(at.residual_of_step(chosen, theta, step))
    return _Attempt(chosen, left, found.num_products + 1, is_settled | is_lower, is_settled)
