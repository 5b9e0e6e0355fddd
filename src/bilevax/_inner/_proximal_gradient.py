"""Accelerated proximal gradient: for minima with a penalty or a set."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._checks import check_step_size
from .._problem import AbstractCondition
from .._tree import stop_gradient, tree_axpy, tree_dot, tree_norm, tree_sub, tree_where
from ._proximal_steps import AbstractProximalSteps, proximal


class ProximalGradient(AbstractProximalSteps):
    """Accelerated proximal gradient steps, for `bx.ProximalMinimum`.

        x_{k+1} = prox(y_k - s grad fn(y_k), s),    y_{k+1} = x_{k+1} + beta_k (x_{k+1} - x_k)

    with the momentum of Nesterov, dropped whenever it points uphill. A step that is too long
    for the curvature it meets is not taken, and the next ones are half as long.

    **Arguments:**

    - `num_steps`: how many steps; with a tolerance, at most so many.
    - `rtol`, `atol`: stop when the norm of the residual (see `bx.ProximalMinimum`) is below
        `rtol` times that of its terms plus `atol`; by default all steps are taken.
    - `step_size`: the first s; by default about one over the largest curvature, from ten
        Hessian products.
    - `accelerated`: without momentum where `False`: the plain method.

    Rules that differentiate steps differentiate these; while the support changes the
    derivative of a step is one of the map on this side of its kinks.

    **Cost:** a gradient and a value a step.

    **Exact when** it has converged: linearly near a strict minimum.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.ProximalGradient(500)
        ```

    Reference: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear
    inverse problems", 2009; O'Donoghue and Candes, "Adaptive restart for accelerated gradient
    schemes", 2015, the gradient scheme.
    """

    num_steps: int
    rtol: float | Scalar | None
    atol: float | Scalar | None
    step_size: float | Scalar | None
    accelerated: bool = eqx.field(static=True)

    # Written out, because type checkers take the abstract `max_steps` for an argument.
    def __init__(
        self,
        num_steps: int,
        *,
        rtol: float | Scalar | None = None,
        atol: float | Scalar | None = None,
        step_size: float | Scalar | None = None,
        accelerated: bool = True,
    ) -> None:
        check_step_size("ProximalGradient", step_size)
        self.num_steps = num_steps
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.accelerated = accelerated
        self.check()

    def prepared(self, condition: Any, x0: PyTree, theta: PyTree) -> tuple[Any, Any]:
        return self, condition.with_step_at(x0, theta)

    def start(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> PyTree[Array]:
        del state
        x0, theta, fixed = stop_gradient((x0, theta, proximal(condition, type(self).__name__)))
        step = fixed.step_at(x0, theta) if self.step_size is None else self.step_size
        tolerance = self.tolerance_at_start(fixed, x0, theta)
        one = jnp.ones_like(tree_norm(x0))
        return x0, x0, one, one * step, tolerance, jnp.array(False)

    def step(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> PyTree[Array]:
        x, y, momentum, step, tolerance, done = carry
        fixed, fixed_theta = stop_gradient((condition, theta))
        minimum = proximal(condition, type(self).__name__)
        value, gradient = jax.value_and_grad(minimum.__call__)(y, theta)
        new_x = minimum.proximal_step(tree_axpy(-step, gradient, y), theta, step)
        move = tree_sub(new_x, y)
        # 1. is the step as short as the curvature asks for?
        seen, gradient, at = stop_gradient((move, gradient, new_x))
        bound = value + tree_dot(gradient, seen) + tree_dot(seen, seen) / (2 * step)
        rounding = 10 * float(jnp.finfo(step.dtype).eps) * jnp.abs(value)
        is_short = fixed(at, fixed_theta) <= jax.lax.stop_gradient(bound) + rounding
        # 2. momentum, unless it points uphill
        forward = tree_sub(new_x, x)
        is_uphill = tree_dot(stop_gradient(forward), seen) < 0
        next_momentum = 0.5 * (1 + jnp.sqrt(1 + 4 * momentum**2))
        next_momentum = jnp.where(is_uphill, jnp.ones_like(momentum), next_momentum)
        factor = jnp.where(is_uphill, 0, (momentum - 1) / next_momentum)
        if not self.accelerated:
            factor = jnp.zeros_like(factor)
        new_y = tree_axpy(factor, forward, new_x)
        new_x, new_y = tree_where(is_short, (new_x, new_y), (x, y))
        momentum = jnp.where(is_short, next_momentum, momentum)
        # 3. the end
        if not self.is_fixed_length:
            residual = tree_norm(seen) / step
            tolerance, done = self.judged(fixed, at, fixed_theta, residual, tolerance, is_short)
        step = jnp.where(is_short, step, 0.5 * step)
        return new_x, new_y, momentum, step, tolerance, done
