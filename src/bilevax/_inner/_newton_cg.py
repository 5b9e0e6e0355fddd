"""Newton's method, its linear systems solved as far as they deserve."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._tree import (
    default_rtol,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_size,
    tree_sub,
    tree_where,
)
from ._line_search import is_decrease, is_level, is_lost, shrink
from ._measured import AbstractMeasuredMinimiser, AbstractMeasuredState, empty_aux, outcome, size
from ._newton_direction import cg_direction, dense_newton
from ._own_scale import Compared, compare, own_magnitude, root_mean_square

# Up to this size a dense Hessian is no slower than conjugate gradients, and exact.
_DENSE_SIZE = 32


class NewtonCG(AbstractMeasuredMinimiser):
    """Newton's method with conjugate gradients, for smooth inner problems.

    `y <- y + t p`, where `||H p + g|| <= eta ||g||`, `g` and `H` the gradient and the
    Hessian at `y`, and `t = 1` unless the line search shortens the step. Stops when

        ||g|| <= atol + rtol ||g|| / omega,

    measured at the `y` that is returned. The error `omega` is the larger of
    `||g|| / ||H y||` in two-norms (on `1/2 y'Ay - c'y` that is `||g|| / ||c||`), and of the
    componentwise backward error, `|g_i|` over the terms of its row in root mean square: no
    variable hides behind another of larger scale. With a factorised Hessian (`dense`) it is
    also the Newton step over `y`, entry by entry.

    **Arguments:**

    - `rtol`, `atol`: tolerances; `rtol=None` is 1e-6 in float64 and 1e-4 below.
    - `max_cg_steps`: the most steps of conjugate gradients per iteration.
    - `dense`: form the Hessian and factorise it, instead of conjugate gradients. By
      default for at most 32 variables.

    **Returns** (from `optx.minimise`): `stats` holds `residual` and `tolerance`, the two
    sides of the stopping rule, `num_gradients` and `num_hessian_products`. Outcomes:
    `stagnation` (rounding errors are larger than the tolerance) and `nonfinite`.

    **Cost:** one linearised gradient and one Hessian product per evaluation, and the
    products of conjugate gradients (the number of variables, if dense). The first of the
    `num_steps` evaluates the start: `K` steps are at most `K - 1` updates.

    **Exact when** the objective is smooth; quadratic convergence near a strict minimum.
    Non-convex objectives are descended, with directions of negative curvature cut off.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp, optimistix as optx

        def ridge(x, theta):
            return jnp.sum((x - 1.0) ** 2) + jnp.exp(theta) * jnp.sum(x**2)

        optx.minimise(ridge, bx.NewtonCG(), jnp.zeros(3), args=0.5).value
        ```

    Reference: Eisenstat and Walker, "Choosing the forcing terms in an inexact Newton
    method", SIAM J. Sci. Comput. 17 (1996), equation (2.2).
    """

    rtol: float | Scalar | None
    atol: float | Scalar
    max_cg_steps: int
    dense: bool | None

    # Written out, because type checkers take Optimistix' abstract `norm` for an argument.
    def __init__(
        self,
        rtol: float | Scalar | None = None,
        atol: float | Scalar = 0.0,
        max_cg_steps: int = 1_000,
        dense: bool | None = None,
    ) -> None:
        check_tolerance("NewtonCG", rtol=rtol, atol=atol)
        check_count("NewtonCG", max_cg_steps=max_cg_steps)
        self.rtol = rtol
        self.atol = atol
        self.max_cg_steps = max_cg_steps
        self.dense = dense

    def factorised(self) -> "NewtonCG | None":
        """With a dense Hessian; `None` where the user has chosen."""
        return None if self.dense is not None else dataclasses.replace(self, dense=True)

    def init(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> "_State":
        del fn, args, options, f_struct, tags
        one, count = jnp.ones((), tree_dtype(y)), jnp.zeros((), jnp.int32)
        return _State(
            y_eval=y,
            y0=y,
            aux=empty_aux(aux_struct),
            f=one,
            residual=one,
            tolerance=one,
            scale=one,
            slope=-one,
            full_slope=-one,
            expected=jnp.inf * one,
            num_gradients=count,
            num_hessian_products=count,
            is_done=jnp.zeros((), bool),
            result=optx.RESULTS.successful,
        )

    def step(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        state: "_State",
        tags: frozenset[object],
    ) -> tuple[PyTree[Array], "_State", PyTree]:
        del options, tags

        def evaluate(y: PyTree) -> tuple[PyTree, tuple[Scalar, PyTree]]:
            value, gradient = jax.value_and_grad(fn, has_aux=True)(y, args)
            return gradient, value

        # 1. objective, gradient and Hessian at the candidate: the only evaluation
        gradient, product, (f, aux) = jax.linearize(evaluate, state.y_eval, has_aux=True)
        f, residual = f.astype(state.f.dtype), size(gradient)

        # 2. accept or reject it
        is_finite = jnp.isfinite(f) & jnp.isfinite(residual)
        accept = is_finite & (state.is_first | _is_progress(state, f, residual))

        # 3. is it a solution, and if not, the next direction
        z = own_magnitude(state.y_eval, state.y0)
        seen = compare(gradient, product, z, lambda scale: residual <= self.tolerance(y, scale))
        find = self._dense if self._is_dense(y) else self._by_cg
        found = find(state, product, gradient, residual, accept, seen, tree_sub(state.y_eval, y))
        is_done, direction = found.is_done, found.direction

        # 4. the next candidate, and the outcome
        moved, slope = tree_sub(state.y_eval, y), tree_dot(gradient, direction)
        factor = shrink(state.slope, tree_dot(gradient, moved))
        is_lost_now = is_lost(state.f, factor * state.slope, state.full_slope)
        is_over = ~accept & (state.is_first | is_lost_now)
        ahead = jtu.tree_map(jnp.add, state.y_eval, direction)
        kept = (state.aux, state.f, state.residual, state.tolerance, state.scale)
        new = (aux, f, residual, found.tolerance, found.scale)
        aux, f, residual, tolerance, scale = tree_where(accept | state.is_first, new, kept)
        new_state = _State(
            y_eval=tree_where(accept, ahead, tree_axpy(factor, moved, y)),
            y0=state.y0,
            aux=aux,
            f=f,
            residual=residual,
            tolerance=tolerance,
            scale=scale,
            slope=jnp.where(accept, slope, factor * state.slope),
            full_slope=jnp.where(accept, slope, state.full_slope),
            expected=jnp.where(accept, found.expected, jnp.inf),
            num_gradients=state.num_gradients + 1,
            num_hessian_products=state.num_hessian_products + found.num_products,
            is_done=is_done,
            result=outcome(is_over, is_finite),
        )
        return tree_where(accept, state.y_eval, y), new_state, aux

    def _dense(
        self,
        state: "_State",
        product: Callable[[PyTree], PyTree],
        gradient: PyTree[Array],
        residual: Scalar,
        accept: Bool[Array, ""],
        seen: Compared,
        moved: PyTree[Array],
    ) -> "_Found":
        z = own_magnitude(state.y_eval, state.y0)
        rtol = default_rtol(z) if self.rtol is None else self.rtol
        # The error after a Newton step is about the square of the step, relative to the
        # variable: where the last one was short no other factorisation is needed.
        is_whole = accept & ~state.is_first & (state.slope == state.full_slope)
        last = root_mean_square(*jax.lax.stop_gradient((moved, z)))
        is_near = is_whole & (last <= 0.3 * jnp.sqrt(jnp.asarray(rtol, last.dtype)))
        is_done = is_near & (residual <= self.tolerance(z, seen.scale))
        may_be_done = residual <= self.tolerance(z, seen.plain)
        newton = dense_newton(
            product, gradient, z, rtol, seen.plain, may_be_done, accept & ~is_done
        )
        is_done |= accept & (residual <= self.tolerance(z, newton.scale))
        scale = jnp.where(is_done, seen.plain, newton.scale)
        tolerance = self.tolerance(z, scale)
        direction = jtu.tree_map(lambda p: jnp.where(is_done, 0, p), newton.direction)
        num_products = seen.num_products + newton.num_products
        return _Found(is_done, tolerance, scale, direction, jnp.zeros_like(residual), num_products)

    def _by_cg(
        self,
        state: "_State",
        product: Callable[[PyTree], PyTree],
        gradient: PyTree[Array],
        residual: Scalar,
        accept: Bool[Array, ""],
        seen: Compared,
        moved: PyTree[Array],
    ) -> "_Found":
        del moved
        tolerance = self.tolerance(gradient, seen.scale)
        is_done = accept & (residual <= tolerance)
        # A zero right-hand side costs nothing.
        is_needed = accept & ~is_done
        b = jtu.tree_map(lambda g: jnp.where(is_needed, -g, jnp.zeros_like(g)), gradient)
        # The scale at the next iterate is about ||H z - g||, and is not zero after a start at
        # zero; where only single rows are open, it is theirs, which is smaller. Half of the
        # tolerance, because this is a guess.
        next_scale = jnp.where(
            residual <= self.tolerance(gradient, seen.plain),
            seen.scale,
            jnp.maximum(seen.plain, residual),
        )
        target = 0.5 * self.tolerance(gradient, next_scale)
        eta = _forcing(state, residual, target, next_scale)
        direction, expected, num_products = cg_direction(product, b, eta, self.max_cg_steps)
        num_products += seen.num_products
        return _Found(is_done, tolerance, seen.scale, direction, expected, num_products)

    def _is_dense(self, y: PyTree[Array]) -> bool:
        return tree_size(y) <= _DENSE_SIZE if self.dense is None else self.dense


class _Found(NamedTuple):
    """What the Hessian at a candidate tells."""

    is_done: Bool[Array, ""]
    tolerance: Scalar
    scale: Scalar
    direction: PyTree[Array]
    expected: Scalar  # the residual after the step, if the objective is quadratic
    num_products: Int[Array, ""]


class _State(AbstractMeasuredState):
    # every evaluation: the next candidate; where the solve began
    y_eval: PyTree[Array]
    y0: PyTree[Array]
    # at the last accepted iterate
    aux: PyTree
    f: Scalar
    residual: Scalar
    tolerance: Scalar
    scale: Scalar
    slope: Scalar  # derivative along the step to the candidate, times its length
    full_slope: Scalar  # the same for the whole Newton step
    expected: Scalar  # the residual at the candidate if the objective is quadratic
    # reported
    num_gradients: Int[Array, ""]
    num_hessian_products: Int[Array, ""]
    is_done: Bool[Array, ""]
    result: optx.RESULTS


def _is_progress(state: _State, f: Scalar, residual: Scalar) -> Bool[Array, ""]:
    """The objective falls, or it is level and the gradient falls.

    Near a minimum the objective is lost in rounding, but Newton steps shorten the gradient.
    """
    part = state.slope / jnp.where(state.full_slope < 0, state.full_slope, -1)
    is_shorter = residual <= (1 - 0.1 * part) * state.residual
    return is_decrease(state.f, f, state.slope) | (is_level(state.f, f) & is_shorter)


def _forcing(state: _State, residual: Scalar, target: Scalar, scale: Scalar) -> Scalar:
    """How far to solve the Newton system, relative to the gradient.

    As far as the linear model of the gradient was wrong at the last step, and no further
    than the tolerance asks for. At the first step nothing is known of the model: the
    relative size of the gradient stands in, and a tolerance in sight is aimed at, so
    that a quadratic objective to low accuracy takes one step.
    """
    residual = jnp.where(residual > 0, residual, 1)
    error = jnp.abs(residual - state.expected) / state.residual
    eta = jnp.where(state.is_first, residual / jnp.where(scale > 0, scale, 1), error)
    eta, target = jnp.where(eta < 0.1, eta, 0.1), target / residual  # 0.1 if not a number
    in_sight = jnp.where(state.is_first, 0.02, 1.0) * eta
    return jnp.minimum(jnp.where(target >= in_sight, target, eta), 0.9)
