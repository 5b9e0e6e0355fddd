"""Limited-memory BFGS that stops on the gradient."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._tree import (
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_scale,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from ._lbfgs_history import History, empty_history
from ._line_search import is_decrease, is_level, is_lost, rounding, shrink
from ._measured import AbstractMeasuredMinimiser, AbstractMeasuredState, empty_aux, outcome, size
from ._own_scale import Compared, compare, own_magnitude

# So many steps without a smaller gradient, where the objective no longer changes, are the
# precision floor: on its way down the gradient of L-BFGS rises for a few steps at a time.
_PATIENCE = 30


class LBFGS(AbstractMeasuredMinimiser):
    """Limited-memory BFGS, for smooth inner problems whose Hessian products are dear.

    `y <- y - t B g`, `g` the gradient and `B` the inverse Hessian of the last pairs of
    steps and changes of the gradient. Stops when

        ||g|| <= atol + rtol ||g|| / omega,

    measured at the `y` that is returned. The error `omega` is the larger of
    `||g|| / ||H y||` in two-norms, `H` the Hessian (on `1/2 y'Ay - c'y` that is
    `||g|| / ||c||`), and of the componentwise backward error, `|g_i|` over the terms of its
    row in root mean square: no variable hides behind another of larger scale.

    **Arguments:**

    - `rtol`, `atol`: tolerances; `rtol=None` is 1e-6 in float64 and 1e-4 below.
    - `history_length`: the number of pairs kept.

    **Returns** (from `optx.minimise`): `stats` holds `residual` and `tolerance`, the two
    sides of the stopping rule, `num_gradients` and `num_hessian_products`. Outcomes:
    `stagnation` (rounding errors are larger than the tolerance) and `nonfinite`.

    **Cost:** one gradient per evaluation; Hessian products only at the start and where
    the stopping rule may hold, usually two or three in all. Memory: `2 history_length`
    vectors. The first step evaluates the start: `K` steps are at most `K - 1` updates.

    **Exact when** the objective is smooth; linear convergence near a strict minimum.
    Non-convex objectives are descended; pairs of non-positive curvature are dropped.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp, optimistix as optx

        def ridge(x, theta):
            return jnp.sum((x - 1.0) ** 2) + jnp.exp(theta) * jnp.sum(x**2)

        optx.minimise(ridge, bx.LBFGS(), jnp.zeros(3), args=0.5).value
        ```

    Reference: Liu and Nocedal, "On the limited memory BFGS method for large scale
    optimization", Math. Programming 45 (1989), algorithm 2.1; the line search accepts by
    slope near the floor: Hager and Zhang, SIAM J. Optim. 16 (2005), equation (4.1).
    """

    rtol: float | Scalar | None
    atol: float | Scalar
    history_length: int

    # Written out, because type checkers take Optimistix' abstract `norm` for an argument.
    def __init__(
        self,
        rtol: float | Scalar | None = None,
        atol: float | Scalar = 0.0,
        history_length: int = 10,
    ) -> None:
        check_tolerance("LBFGS", rtol=rtol, atol=atol)
        check_count("LBFGS", history_length=history_length)
        self.rtol = rtol
        self.atol = atol
        self.history_length = history_length

    # Its steps are cheap, and there are many.
    usual_max_steps: ClassVar[int] = 5000

    def empty_memory(self, y: PyTree[Array]) -> History:
        """The pairs before the first step, which a preconditioner takes over."""
        return empty_history(y, self.history_length)

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
            gradient=tree_zeros_like(y),
            history=self.empty_memory(y),
            aux=empty_aux(aux_struct),
            f=one,
            residual=one,
            scale=one,
            slope=-one,
            full_slope=-one,
            best=jnp.inf * one,
            num_idle=count,
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

        # 1. objective and gradient at the candidate; accept or reject it
        gradient, (f, aux) = evaluate(state.y_eval)
        f, residual = f.astype(state.f.dtype), size(gradient)
        moved = tree_sub(state.y_eval, y)
        new_slope = tree_dot(gradient, moved)
        is_finite = jnp.isfinite(f) & jnp.isfinite(residual)
        accept = is_finite & (state.is_first | _is_progress(state, f, new_slope))
        factor = shrink(state.slope, new_slope)
        num_idle = _num_idle(state, accept, residual)
        is_lost_now = is_lost(state.f, factor * state.slope, state.full_slope)
        is_over = (~accept & (state.is_first | is_lost_now)) | (num_idle >= _PATIENCE)
        history = state.history.add(moved, tree_sub(gradient, state.gradient), accept)

        # 2. converged? the scale costs a Hessian product: only where it may matter
        new_y, gradient, aux, f, residual = tree_where(
            accept | state.is_first,
            (state.y_eval, gradient, aux, f, residual),
            (y, state.gradient, state.aux, state.f, state.residual),
        )
        is_measured = (
            state.is_first | is_over | (accept & (residual <= self.tolerance(y, state.scale)))
        )

        def measured() -> tuple[Compared, Scalar]:
            z = own_magnitude(new_y, state.y0)
            _, product = jax.linearize(lambda y: evaluate(y)[0], new_y)
            seen = compare(gradient, product, z, lambda scale: residual <= self.tolerance(y, scale))
            return seen, _first_length(optx.two_norm(z), seen.plain, residual)

        none = Compared(state.scale, state.scale, jnp.zeros((), jnp.int32))
        seen, first_length = jax.lax.cond(is_measured, measured, lambda: (none, history.length))
        own, scale = seen.scale, seen.plain
        is_done = is_measured & jnp.isfinite(residual) & (residual <= self.tolerance(y, own))

        # 3. the next candidate
        length = jnp.where(state.is_first, first_length, history.length)
        history = eqx.tree_at(lambda h: h.length, history, length)
        direction, slope = _descent(history, gradient, residual, is_done)
        ahead = jtu.tree_map(jnp.add, new_y, direction)
        # H y0 - g0 is the constant of a quadratic objective: a first guess of the scale
        guess = jnp.where(jnp.isfinite(scale), scale, 0) + residual
        new_state = _State(
            y_eval=tree_where(accept, ahead, tree_axpy(factor, moved, y)),
            y0=state.y0,
            gradient=gradient,
            history=history,
            aux=aux,
            f=f,
            residual=residual,
            scale=jnp.where(state.is_first & is_finite & ~is_done, guess, own),
            slope=jnp.where(accept, slope, factor * state.slope),
            full_slope=jnp.where(accept, slope, state.full_slope),
            best=jnp.minimum(residual, state.best),
            num_idle=num_idle,
            num_gradients=state.num_gradients + 1,
            num_hessian_products=state.num_hessian_products + seen.num_products,
            is_done=is_done,
            result=outcome(is_over & ~is_done, is_finite),
        )
        return new_y, new_state, aux


class _State(AbstractMeasuredState):
    # every evaluation: the next candidate; where the solve began
    y_eval: PyTree[Array]
    y0: PyTree[Array]
    # at the last accepted iterate
    gradient: PyTree[Array]
    history: History
    aux: PyTree
    f: Scalar
    residual: Scalar
    scale: Scalar  # at the last measurement; a guess until the residual is small beside it
    slope: Scalar  # derivative along the step to the candidate, times its length
    full_slope: Scalar  # the same for the whole step
    best: Scalar  # the smallest residual
    num_idle: Int[Array, ""]  # steps without progress
    # reported
    num_gradients: Int[Array, ""]
    num_hessian_products: Int[Array, ""]
    is_done: Bool[Array, ""]
    result: optx.RESULTS


def _is_progress(state: _State, f: Scalar, new_slope: Scalar) -> Bool[Array, ""]:
    """The objective falls, or it is level and the step went not far beyond the minimum.

    Near a minimum the objective is lost in rounding, but its slope is not.
    """
    is_short = new_slope <= -0.9 * state.slope
    return is_decrease(state.f, f, state.slope) | (is_level(state.f, f) & is_short)


def _num_idle(state: _State, accept: Bool[Array, ""], residual: Scalar) -> Int[Array, ""]:
    """Steps since the gradient was smallest, while the objective is lost in rounding."""
    is_idle = (residual >= state.best) & (-state.slope <= rounding(state.f))
    return jnp.where(accept, jnp.where(is_idle, state.num_idle + 1, 0), state.num_idle)


def _first_length(norm_z: Scalar, scale: Scalar, residual: Scalar) -> Scalar:
    """The first step over the gradient: the inverse curvature along z, or a unit step."""
    is_known = (norm_z > 0) & (scale > 0)
    unit = 1 / jnp.where(residual > 0, residual, 1)
    return jnp.where(is_known, norm_z / jnp.where(is_known, scale, 1), unit)


def _descent(
    history: History, gradient: PyTree[Array], residual: Scalar, is_done: Bool[Array, ""]
) -> tuple[PyTree[Array], Scalar]:
    """A direction in which the objective falls, or zero, and the slope along it."""
    direction = history.direction(gradient)
    slope = tree_dot(gradient, direction)
    is_down = slope < 0  # false also where it is not a number
    direction = tree_where(is_down, direction, tree_scale(-history.length, gradient))
    direction = tree_where(is_done, tree_zeros_like(direction), direction)
    return direction, jnp.where(is_down, slope, -history.length * residual**2)
