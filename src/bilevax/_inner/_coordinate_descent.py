"""Coordinate descent: for quadratic functions with a separable term."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._problem import AbstractCondition
from .._problem._fixed import is_fixed
from .._tree import (
    dense_columns,
    flat_to_tree,
    stop_gradient,
    tree_norm,
    tree_size,
    tree_sub,
    tree_to_flat,
    tree_zeros_like,
)
from ._base import Counts
from ._proximal_steps import AbstractProximalSteps, proximal

# The Hessian is formed: 128 MiB in float64.
_MOST = 4_096


class CoordinateDescent(AbstractProximalSteps):
    """Cyclic coordinate descent, for a `bx.ProximalMinimum` with a quadratic `fn`.

    A step is a sweep: one entry of x after the other moves to its minimum, all others held,

        x_j <- prox(x_j - g_j / H_jj, 1 / H_jj),    g <- g + H_:j (change of x_j),

    with the gradient g and the Hessian H of `fn`. It has no step size, and small steps only
    where columns are nearly parallel. The term is one of separable entries: `L1`,
    `WeightedL1`, `ElasticNet`, `Box`, `NonNegative`, or a pytree of these and `None`: the
    lasso, least squares in a box, the dual of a support vector machine.

    **Arguments:**

    - `num_steps`: how many sweeps; with a tolerance, at most so many.
    - `rtol`, `atol`: stop when the norm of the residual (see `bx.ProximalMinimum`) is below
        `rtol` times that of its terms plus `atol`; by default all sweeps are taken.

    The default, `bx.ProximalNewton`, mostly needs less time; this is the solver whose steps
    are known from scikit-learn and LIBLINEAR, and one to unroll: H may depend on theta.

    **Raises** `TypeError` where `fn` is not quadratic or the term not separable; `ValueError`
    for more than 4,096 variables, as H is formed.

    **Cost:** a Hessian product for each variable, once (a sweep, where sweeps are
    differentiated); a sweep is a gradient and `size of x` squared.

    **Exact when** it has converged: linearly, once the support is found.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.CoordinateDescent(1_000, rtol=1e-10)
        ```

    Reference: Friedman, Hastie and Tibshirani, "Regularization paths for generalized linear
    models via coordinate descent", 2010, section 2, with updates of the gradient by columns of
    the Hessian; Tseng, "Convergence of a block coordinate descent method for nondifferentiable
    minimization", 2001.
    """

    num_steps: int
    rtol: float | Scalar | None
    atol: float | Scalar | None
    hessian: Float[Array, "p p"] | None

    # Written out, because type checkers take the abstract `max_steps` for an argument.
    def __init__(
        self,
        num_steps: int,
        *,
        rtol: float | Scalar | None = None,
        atol: float | Scalar | None = None,
    ) -> None:
        self.num_steps = num_steps
        self.rtol = rtol
        self.atol = atol
        self.hessian = None
        self.check()

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        _quadratic(condition, x0, theta)

    def prepared(self, condition: Any, x0: PyTree, theta: PyTree) -> tuple[Any, Any]:
        hessian = _quadratic(condition, x0, theta)(tree_zeros_like(x0))
        solver = eqx.tree_at(lambda s: s.hessian, self, hessian, is_leaf=lambda a: a is None)
        return solver, condition.with_step_at(x0, theta)

    def counts(self, num_steps: Int[Array, ""], x: PyTree) -> Counts:
        return Counts(gradients=num_steps, hessian=tree_size(x))

    def start(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> PyTree[Array]:
        del state
        start, theta, fixed = stop_gradient((x0, theta, proximal(condition, type(self).__name__)))
        step = fixed.step_at(start, theta)
        tolerance = self.tolerance_at_start(fixed, start, theta)
        return x0, step, tolerance, jnp.array(False)

    def step(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> PyTree[Array]:
        x, step, tolerance, done = carry
        minimum = proximal(condition, type(self).__name__)
        hessian = self.hessian
        if hessian is None:
            hessian = _quadratic(minimum, x, theta)(tree_zeros_like(x))
        lengths = 1 / _positive(jnp.diagonal(hessian))

        def move(at: tuple[Array, Array], entry: tuple) -> tuple[tuple[Array, Array], None]:
            flat, g = at
            index, length, column = entry
            z = flat_to_tree(flat - length * g, x)
            new = tree_to_flat(minimum.proximal_step(z, theta, length))[index]
            change = new - flat[index]
            return (flat.at[index].set(new), g + change * column), None

        flat, g = tree_to_flat(x), tree_to_flat(minimum.gradient(x, theta))
        (flat, g), _ = jax.lax.scan(move, (flat, g), (jnp.arange(flat.size), lengths, hessian))
        x = flat_to_tree(flat, x)
        if not self.is_fixed_length:
            z = flat_to_tree(flat - step * g, x)
            at, z, fixed, fixed_theta = stop_gradient((x, z, minimum, theta))
            moved = fixed.proximal_step(z, fixed_theta, step)
            residual = tree_norm(tree_sub(at, moved)) / step
            tolerance, done = self.judged(fixed, at, fixed_theta, residual, tolerance)
        return x, step, tolerance, done


def _quadratic(condition: AbstractCondition, x: PyTree, theta: PyTree) -> Callable[[PyTree], Array]:
    """The Hessian of `fn`, a function of x that does not use it; an error where there is none."""
    minimum = proximal(condition, "CoordinateDescent")
    if not minimum.nonsmooth.is_separable:
        raise TypeError(
            "`CoordinateDescent` moves one entry after the other, for bx.prox.L1, WeightedL1, "
            "ElasticNet, Box, NonNegative, or a pytree of these and None; the term is "
            f"{minimum.nonsmooth!r}. Take bx.ProximalNewton()."
        )
    if tree_size(x) > _MOST:
        raise ValueError(
            f"`CoordinateDescent` forms the Hessian, of at most {_MOST:,} variables; x has "
            f"{tree_size(x):,}. Take bx.ProximalNewton()."
        )

    def hessian(x: PyTree) -> Array:
        _, product = jax.linearize(lambda x: minimum.gradient(x, theta), x)
        return dense_columns(product, x)

    if not is_fixed(hessian, x):
        raise TypeError(
            "`CoordinateDescent` takes a quadratic `fn`; the Hessian of this one depends on x. "
            "Take bx.ProximalNewton()."
        )
    return hessian


def _positive(curvature: Float[Array, " p"]) -> Float[Array, " p"]:
    """Along an entry without curvature: as if it had the largest."""
    largest = jnp.max(jnp.abs(curvature), initial=0)
    fallback = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return jnp.where(curvature > 0, curvature, fallback)
