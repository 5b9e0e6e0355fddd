"""A line search one evaluation a step, for values and slopes that are not exact.

Both the value and the hypergradient carry the errors of two solves that were stopped
early. A decrease is therefore asked for only up to the noise of the two values compared:
without that, a search near the optimum rejects for ever.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._hypergradient._base import Estimate
from .._tree import (
    is_bounded,
    largest_entry,
    tree_all_finite,
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_sub,
    unbounded,
)

_ARMIJO = 1e-4
_MAX_REJECTIONS = 20  # a factor of at most 2 each: a millionth of the step
# Without an error estimate: what a dual value may be worse than its order says.
_UNKNOWN_ERROR = 0.1
# The measured error of the dual value on logistic regression was 3 to 4 times the product.
_SAFETY = 4.0


def value_noise(estimate: Estimate) -> Scalar:
    """How far `best_value` may be from `L(x*(theta), theta)`.

    `L(x) - F = v(s)' grad U` for some adjoint between x and x*, so the error of the dual
    value is its correction times the relative error of v: one order higher than the
    error of `value`.
    """
    error = relative_error(estimate, _UNKNOWN_ERROR)
    correction = jnp.abs(estimate.value - estimate.best_value)
    rounding = 10 * jnp.finfo(correction.dtype).eps * jnp.abs(estimate.best_value)
    noise = _SAFETY * error.astype(correction.dtype) * correction + rounding
    return jnp.where(jnp.isfinite(noise), noise, 0)


def value_range(estimate: Estimate) -> tuple[Scalar, Scalar]:
    """Where `L(x*(theta), theta)` is, as far as the errors of `estimate` are known."""
    noise = value_noise(estimate)
    return estimate.best_value - noise, estimate.best_value + noise


def gradient_noise(estimate: Estimate) -> Scalar:
    """How far `grad` may be from the hypergradient, in the two-norm."""
    return relative_error(estimate, 0.0) * tree_norm(estimate.grad)


def relative_error(estimate: Estimate, otherwise: float) -> Scalar:
    """Error estimate over norm of the hypergradient, at most 1.

    Where there is no error estimate, `otherwise` and the adjoint residual stand in.
    """
    norm = tree_norm(estimate.grad)
    guess = jnp.full_like(norm, otherwise)
    if estimate.adjoint_residual is not None:
        residual = estimate.adjoint_residual.astype(norm.dtype)
        guess = guess + jnp.where(jnp.isfinite(residual), residual, 0)
    if estimate.error_estimate is not None:
        error = estimate.error_estimate.astype(norm.dtype)
        is_known = is_bounded(error)
        ratio = jnp.where(is_known, error, 0) / jnp.where(norm > 0, norm, 1)
        guess = jnp.where(is_known, ratio, guess)
    return jnp.minimum(guess, 1)


def limited(
    direction: PyTree[Array], gradient: PyTree[Array], max_step: Array | float
) -> PyTree[Array]:
    """`direction`, no entry of it longer than `max_step`.

    Entry by entry, so that one far entry does not hold up the others; if the rest is no
    longer a direction of descent, as a whole. If `direction` is none itself, or not
    finite, `steepest`.
    """
    clipped = jtu.tree_map(
        lambda d: jnp.clip(d, -jnp.asarray(max_step, d.dtype), jnp.asarray(max_step, d.dtype)),
        direction,
    )
    whole = rescaled(direction, max_step, only_shorten=True)
    slope = tree_dot(gradient, whole)
    is_descent = jnp.isfinite(slope) & (slope < 0) & tree_all_finite(direction)
    keeps = tree_dot(gradient, clipped) <= 0.1 * slope
    downhill = steepest(gradient, max_step)
    return jtu.tree_map(
        lambda c, w, s: jnp.where(is_descent, jnp.where(keeps, c, w), s), clipped, whole, downhill
    )


def steepest(gradient: PyTree[Array], max_step: Array | float) -> PyTree[Array]:
    """Minus the gradient, its largest entry made as long as `max_step`."""
    return rescaled(jtu.tree_map(jnp.negative, gradient), max_step, only_shorten=False)


def rescaled(
    direction: PyTree[Array], max_step: Array | float, *, only_shorten: bool
) -> PyTree[Array]:
    """`direction` with `max_step` as its largest entry."""
    longest = largest_entry(direction)
    factor = jnp.asarray(max_step, longest.dtype) / jnp.where(longest > 0, longest, 1)
    return tree_scale(jnp.minimum(factor, 1) if only_shorten else factor, direction)


def check_step(name: str, max_step: Any) -> None:
    """Raise unless the longest step is traced or a positive number."""
    if isinstance(max_step, int | float) and not 0 < max_step < float("inf"):
        raise ValueError(f"{name}(max_step=...) must be positive and finite; got {max_step}.")


class Search(eqx.Module):
    """A line search under way: the accepted theta, which its owner keeps, and the trial."""

    # at the accepted theta
    grad: PyTree[Array]
    value: Scalar
    noise: Scalar
    predicted_decrease: Scalar
    # of the trial
    point: PyTree[Array]
    slope: Scalar  # derivative along the step to the trial, times its length
    num_rejections: Int[Array, ""]
    is_first: Bool[Array, ""]  # nothing was accepted yet

    def accepts(self, estimate: Estimate) -> Bool[Array, ""]:
        """Armijo on the best value, relaxed by the noise of both values."""
        value = estimate.best_value
        allowed = self.value + _ARMIJO * self.slope + self.noise + value_noise(estimate)
        return is_bounded(value) & (self.is_first | (value <= allowed))

    def shortened(self, theta: PyTree, estimate: Estimate) -> "Search":
        """After a rejection: the minimum of the parabola through both values, within bounds."""
        rise = estimate.best_value - self.value - self.slope
        factor = jnp.where(rise > 0, -0.5 * self.slope / jnp.where(rise > 0, rise, 1), 0.5)
        factor = jnp.where(is_bounded(estimate.best_value), jnp.clip(factor, 0.1, 0.5), 0.25)
        step = tree_sub(self.point, theta)
        return eqx.tree_at(
            lambda s: (s.point, s.slope, s.num_rejections),
            self,
            (tree_axpy(factor, step, theta), factor * self.slope, self.num_rejections + 1),
        )

    def restarted(self, theta: PyTree, max_step: Array | float) -> "Search":
        """A new search from the accepted theta, along the steepest descent."""
        step = steepest(self.grad, max_step)
        return eqx.tree_at(
            lambda s: (s.point, s.slope, s.num_rejections),
            self,
            (
                jtu.tree_map(jnp.add, theta, step),
                tree_dot(self.grad, step).astype(self.slope.dtype),
                jnp.zeros((), jnp.int32),
            ),
        )

    @property
    def is_lost(self) -> Bool[Array, ""]:
        """Whether the trial has been shortened so often that nothing is to be hoped for."""
        return self.num_rejections >= _MAX_REJECTIONS


def first_search(theta: PyTree) -> Search:
    """Before the first evaluation, which is accepted if it is finite."""
    zero = jnp.zeros((), tree_norm(theta).dtype)
    nothing = jtu.tree_map(jnp.zeros_like, theta)
    count = jnp.zeros((), jnp.int32)
    return Search(nothing, zero, zero, unbounded(zero), theta, zero, count, jnp.array(True))


def next_search(
    estimate: Estimate, point: PyTree, step: PyTree, predicted_decrease: Scalar, like: Search
) -> Search:
    """After an acceptance at `point`: the next trial is `point + step`."""
    return Search(
        grad=estimate.grad,
        value=estimate.best_value.astype(like.value.dtype),
        noise=value_noise(estimate).astype(like.value.dtype),
        predicted_decrease=predicted_decrease.astype(like.value.dtype),
        point=jtu.tree_map(jnp.add, point, step),
        slope=tree_dot(estimate.grad, step).astype(like.value.dtype),
        num_rejections=jnp.zeros((), jnp.int32),
        is_first=jnp.array(False),
    )


def is_finished(estimate: Estimate, predicted_decrease: Scalar) -> Bool[Array, ""]:
    """Whether the model predicts no decrease for the next step that this dtype could show."""
    value = jnp.abs(estimate.best_value)
    return predicted_decrease <= jnp.finfo(value.dtype).eps * value.astype(predicted_decrease.dtype)
