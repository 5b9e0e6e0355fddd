"""Minima of a smooth function and a term that is not: a penalty, or a set."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_step_size
from .._linear import CG, LU, solve_linear
from .._linear._common import largest_eigenvalue
from .._prox import AbstractProx, At, Piece, as_prox
from .._results import RESULTS
from .._tree import (
    stop_gradient,
    tree_axpy,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_size,
    tree_sub,
    tree_zeros_like,
)
from ._condition import AbstractCondition, check_scalar
from ._linearised import Linearised, of_equation
from ._predictors import Predictors, predictors, product, take

# By how much the power method for the largest curvature may fall short.
_SHORT = 1.3
# Of rounding errors, and of what the residual says of the error of x where nothing else does.
_NEAR = 10.0
_FAR = 100.0
_NEWTON_RTOL = 1e-6
_NEWTON_STEPS = 200
_DENSE = 256
# Of so many entries on few are worth looking for.
_WIDE = 1_024


class ProximalMinimum(AbstractCondition):
    """`x*(theta)` minimises `fn(x, theta) + R(x, theta)`, `fn` smooth and `R` one of `bx.prox`.

    **Arguments:**

    - `fn`: `(x, theta)` or, with data, `(x, theta, data)` to a scalar.
    - `prox`: a penalty or a set, such as `bx.prox.L1(lambda theta: jnp.exp(theta))`; a pytree of
        these and `None` like x; or a pair of functions `(value, prox)`, see `bx.prox.Own`.
    - `step_size`: the s of the residual, by default measured with ten Hessian products.
    - `data`: as in `Minimum`. Where `fn` returns `(value, aux)`, say `has_aux=True`.

    The residual is `(x - prox(x - s grad_x fn, s)) / s`, s about one over the largest
    curvature of `fn`: for a lasso coefficient that is not zero `d_j fn + strength sign(x_j)`,
    for one that is, what `|d_j fn|` exceeds the strength by. How `x*` moves is known on the
    smooth piece of `R` on which it lies (its support, the bounds that hold, its groups): there

        A D x* + B = 0,    A = T (H + R'') T + (1 - T),

    with `T` the projection on the directions in which x is free, so that `A` is symmetric, and
    positive definite where the minimum is strict. Bounds that move with theta move x.

    **Outcomes:** `at_kink` where x is so near to another piece that its error decides between
    the two: the derivative there is one-sided. `support_not_identified` where the inner solve
    ended early and a further step would change the piece. `empty_support` where a penalty has
    left no entry: the hypergradient is zero, and says nothing of a smaller strength.

    **Exact when** x is the solution and no entry is at a kink (`|d_j fn|` equal to the strength).

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        lasso = bx.ProximalMinimum(
            lambda x, theta: 0.5 * jnp.sum((x - jnp.array([1.0, 0.1])) ** 2),
            bx.prox.L1(lambda theta: jnp.exp(theta)),
        )
        problem = bx.Bilevel(lasso, lambda x, theta: jnp.sum((x - 0.5) ** 2))
        estimate, _ = bx.hypergradient(problem, jnp.zeros(2), jnp.array(-1.5))
        ```

    Reference: Bertrand et al., "Implicit differentiation for fast hyperparameter selection in
    non-smooth convex learning", 2022, for separable terms; `T` and `R''` are those of
    the tangent space of the piece.
    """

    fn: Callable
    prox: AbstractProx = eqx.field(converter=as_prox)
    data: PyTree = None
    step_size: float | Scalar | None = None
    has_aux: bool = eqx.field(default=False, static=True)

    def __check_init__(self) -> None:
        check_step_size("ProximalMinimum", self.step_size)

    @property
    def is_symmetric(self) -> bool:
        return self.prox.has_pieces

    @property
    def nonsmooth(self) -> AbstractProx:
        return self.prox

    @property
    def kind(self) -> str:
        return "minimise"

    def __call__(self, x: PyTree, theta: PyTree) -> Scalar:
        parts = self.predictors(x, theta)
        if parts is None:
            return super().__call__(x, theta)
        return parts.rest([product(num_columns(x), m, x) for m in parts.matrices])

    def predictors(self, x: PyTree, theta: PyTree) -> Predictors | None:
        """`fn` as a function of products with x, where that is many entries, most of them zero."""
        is_wide = eqx.is_array(x) and x.ndim == 1 and x.size >= _WIDE
        if not (is_wide and self.prox.leaves_few):
            return None
        return predictors(lambda x: super(ProximalMinimum, self).__call__(x, theta), x)

    def check_output(self, out: Any, x: PyTree) -> None:
        del x
        check_scalar(out, "inner")

    def map_functions(self, wrap: Callable[[Callable], Callable]) -> "ProximalMinimum":
        return dataclasses.replace(self, fn=wrap(self.fn), prox=self.prox.map_functions(wrap))

    def value(self, x: PyTree, theta: PyTree) -> Scalar:
        """`fn + R`."""
        return self(x, theta) + self.prox.value(x, self._at(x, theta))

    def gradient(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        """Of the smooth part."""
        return jax.grad(self.__call__)(x, theta)

    def step_at(self, x: PyTree, theta: PyTree) -> Scalar:
        """The step size: about one over the largest curvature of `fn` at x; a constant."""
        if self.step_size is not None:
            return jnp.asarray(self.step_size, tree_dtype(x))
        x, theta = stop_gradient((x, theta))
        smooth, inside = self.__call__, x
        if self.predictors(x, theta) is not None:
            # Of the columns that matter: those of x, and where the gradient is largest.
            score = jnp.where(x != 0, jnp.inf, jnp.abs(self.gradient(x, theta)))
            _, index = jax.lax.top_k(score, num_columns(x))
            smooth, inside = self.restricted(x, theta, index), x[index]
        _, products = jax.linearize(lambda x: jax.grad(smooth)(x, theta), inside)
        curvature = largest_eigenvalue(products, tree_zeros_like(inside))
        is_known = jnp.isfinite(curvature) & (curvature > 0)
        step = jnp.where(is_known, 1 / (_SHORT * jnp.where(is_known, curvature, 1)), 1)
        return jax.lax.stop_gradient(step)

    def restricted(self, x: Array, theta: PyTree, index: Int[Array, " k"]) -> Callable:
        """`fn` of some entries of x, all others zero; an index beyond the last is left out."""

        def smooth(inside: Array, theta: PyTree) -> Scalar:
            parts = self.predictors(x, theta)
            assert parts is not None
            return parts.rest([columns @ inside for columns in parts.columns(index)])

        return smooth

    def among(self, x: Array, theta: PyTree, index: Int[Array, " k"]) -> "ProximalMinimum":
        """The problem in some entries of x, all others zero."""
        prox = self.prox.of_entries(x, self._at(x, theta), index)
        few = ProximalMinimum(self.restricted(x, theta, index), prox)
        return few.with_step_at(x[index], theta)

    def with_step_at(self, x: PyTree, theta: PyTree) -> "ProximalMinimum":
        """The same, the step size measured once and for all."""
        return dataclasses.replace(self, step_size=self.step_at(x, theta))

    def forward(self, x: PyTree, theta: PyTree, step: Scalar) -> PyTree[Array]:
        """`x - step grad fn`, from where the proximal step is taken."""
        return tree_axpy(-step, self.gradient(x, theta), x)

    def proximal_step(self, z: PyTree, theta: PyTree, step: Scalar) -> PyTree[Array]:
        """`prox(z, step)`."""
        return self.prox.prox(z, step, self._at(z, theta))

    def placed(self, piece: Piece, x: PyTree, theta: PyTree) -> PyTree[Array]:
        """The x of a piece nearest to x."""
        return piece.place(x, self._at(x, theta))

    def _at(self, x: PyTree, theta: PyTree) -> At:
        return At(x, theta, () if self.data is None else (self.data,))

    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return self.residual_of_step(x, theta, self.step_at(x, theta))

    def residual_of_step(self, x: PyTree, theta: PyTree, step: Scalar) -> PyTree[Array]:
        """The residual, with another step size."""
        moved = self.proximal_step(self.forward(x, theta, step), theta, step)
        return tree_scale(1 / step, tree_sub(x, moved))

    def piece(self, x: PyTree, theta: PyTree, step: Scalar) -> Piece:
        """The smooth piece of `R` on which a step from x ends; a constant."""
        x, theta, step = stop_gradient((x, theta, step))
        return self.prox.piece(self.forward(x, theta, step), step, self._at(x, theta))

    def equation_at(self, x: PyTree, theta: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
        step = self.step_at(x, theta)
        if not self.prox.has_pieces:
            return lambda x, theta: self.residual_of_step(x, theta, step)
        return self.equation_on(self.piece(x, theta, step))

    def equation_on(self, piece: Piece) -> Callable[[PyTree, PyTree], PyTree]:
        """The smooth map of a piece: the gradient along it, and what x is off it."""
        return self._equation(piece, self)

    def _equation(self, piece: Piece, fn: Callable) -> Callable[[PyTree, PyTree], PyTree]:
        """The same, `fn` written otherwise."""

        def on_piece(x: PyTree, theta: PyTree) -> PyTree:
            placed = self.placed(piece, x, theta)

            def value(x: PyTree) -> Scalar:
                smooth = fn(x, theta)
                return smooth + piece.smooth(x, self._at(x, theta)).astype(smooth.dtype)

            along = piece.tangent(placed, jax.grad(value)(placed))
            return jtu.tree_map(lambda g, a, b: g + (a - b), along, x, placed)

        return on_piece

    def linearise(self, x: PyTree, theta: PyTree) -> Linearised:
        if not self.prox.has_pieces:
            return super().linearise(x, theta)
        return self.linearised_on(self.piece(x, theta, self.step_at(x, theta)), x, theta)

    def linearised_on(self, piece: Piece, x: PyTree, theta: PyTree) -> Linearised:
        """`equation_on`, its products by the columns of the free entries where they are few."""
        whole = self.equation_on(piece)
        if self.predictors(x, theta) is None:
            return of_equation(whole, x, theta)
        most, ((is_free, _),) = num_columns(x), piece.tag
        is_few = piece.num_free <= most
        (index,) = jnp.nonzero(is_free, size=most, fill_value=x.size)
        smooth = self.restricted(x, theta, index)

        def of_columns(x: Array, theta: PyTree) -> Scalar:
            return smooth(take(x, index), theta)

        few = of_equation(self._equation(piece, of_columns), x, theta)

        # Not a condition that is differentiated, which would copy the matrices.
        def forward(v: Array) -> Array:
            return jax.lax.cond(
                is_few,
                few.forward,
                lambda v: jax.jvp(lambda x: whole(x, theta), (x,), (v,))[1],
                v,
            )

        def both(v: Array) -> tuple[Array, PyTree]:
            # The pass to x is inside: where it is not needed it is not made.
            def of_whole(v: Array) -> tuple[Array, PyTree]:
                return jax.vjp(whole, x, theta)[1](v)

            return jax.lax.cond(is_few, few.both, of_whole, v)

        residual = jax.lax.cond(is_few, lambda: few.residual, lambda: whole(x, theta))
        return Linearised(residual, forward, forward, both)

    def verdict(self, x: PyTree, theta: PyTree, residual: Scalar, tolerance: Scalar) -> RESULTS:
        step, at = self.step_at(x, theta), self._at(x, theta)
        z = self.forward(x, theta, step)
        is_solved = residual <= tolerance
        rounding = _NEAR * float(jnp.finfo(step.dtype).eps) * tree_norm(z)
        if not self.prox.has_pieces:
            distance = _FAR * step * residual + rounding
            is_near = is_solved & self.prox.is_near_kink(z, step, at, distance)
            return RESULTS.where(is_near, RESULTS.at_kink, RESULTS.successful)
        piece = self.prox.piece(z, step, at)
        # 1. a solution: is its piece that of the Newton point, which is nearer to it?
        newton_x = self._newton_point(piece, x, theta, is_solved)
        newton_z = self.forward(newton_x, theta, step)
        newton = self.prox.piece(newton_z, step, at)
        is_left = _differ(piece, newton)
        moved = tree_norm(tree_sub(newton_z, z))
        is_near = is_left | (newton.gap <= 2 * moved + rounding)
        result = RESULTS.where(is_solved & is_near, RESULTS.at_kink, RESULTS.successful)
        if self.prox.is_penalty:
            is_empty = is_solved & (piece.num_free == 0)
            result = RESULTS.where(is_empty, RESULTS.empty_support, result)
        # 2. where the solve ended early: does the next step lead to another piece?
        ahead = self.prox.prox(z, step, at)
        is_changing = _differ(piece, self.piece(ahead, theta, step))
        is_changing |= tree_norm(tree_sub(x, self.placed(piece, x, theta))) > step * residual
        return RESULTS.where(~is_solved & is_changing, RESULTS.support_not_identified, result)

    def _newton_point(
        self, piece: Piece, x: PyTree, theta: PyTree, is_wanted: Bool[Array, ""]
    ) -> PyTree[Array]:
        """Where a Newton step on its piece takes x."""
        at = self.linearised_on(piece, x, theta)
        b = jtu.tree_map(lambda a: jnp.where(is_wanted, a, 0), at.residual)
        found = solve_linear(newton_solver(x, _NEWTON_RTOL), at.forward, b)
        return self.placed(piece, tree_sub(x, found.value), theta)


def num_columns(x: Array) -> int:
    """How many entries that are not zero count as few."""
    return min(max(32, 2 ** math.ceil(math.log2(x.size / 64))), 512)


def newton_solver(x: PyTree, rtol: float) -> lx.AbstractLinearSolver:
    """Of the systems on a piece; of few variables by a factorisation, whatever the condition."""
    if tree_size(x) <= _DENSE:
        return LU()
    return CG(rtol, max_steps=_NEWTON_STEPS)


def _differ(a: Piece, b: Piece) -> Bool[Array, ""]:
    same = [
        jnp.array_equal(*tags) for tags in zip(*map(jtu.tree_leaves, (a.tag, b.tag)), strict=True)
    ]
    return ~jnp.all(jnp.stack(same))
