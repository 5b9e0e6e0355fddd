"""Penalties of single entries: lasso and elastic net."""

from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from ._base import AbstractLeafwise, LeafPiece, Settings, on_mask, setting


def soft(z: Array, threshold: Array) -> Array:
    """`z` moved towards zero by `threshold`, at most to zero."""
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - threshold, 0)


def distance_to_kinks(z: Array, threshold: Array) -> Array:
    """Of `soft`; without a threshold it has none."""
    return jnp.where(threshold > 0, jnp.abs(jnp.abs(z) - threshold), jnp.inf)


def is_kept(z: Array, threshold: Array) -> Array:
    """Whether `soft` leaves the entry free to move."""
    return (jnp.abs(z) > threshold) | (threshold == 0)


def _soft_piece(z: Array, threshold: Array, value: Callable[..., Scalar]) -> LeafPiece:
    """The support of `soft(z, threshold)`; `value` is called with x and its magnitudes."""
    is_free, signs = is_kept(z, threshold), jnp.sign(z)
    return on_mask(
        is_free,
        lambda *_: jnp.zeros((), z.dtype),
        lambda x, *at: value(x, signs * x, *at),
        distance_to_kinks(z, threshold),
        jnp.where(is_free & (threshold > 0), signs, 0),
    )


class L1(AbstractLeafwise):
    """`strength ||x||_1`: the lasso.

    **Arguments:**

    - `strength`: a number, an array of the shape of x (a strength for each entry), a pytree like
        x of these, or a function of theta that returns one. Not negative.

    Its proximal step is soft thresholding.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.L1(lambda theta: jnp.exp(theta))
        ```

    Reference: Tibshirani, "Regression shrinkage and selection via the lasso", 1996.
    """

    settings: ClassVar[tuple[str, ...]] = ("strength",)
    is_penalty: ClassVar[bool] = True
    leaves_few: ClassVar[bool] = True
    is_separable: ClassVar[bool] = True

    strength: PyTree = setting(1.0)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        (strength,) = at
        return jnp.sum(strength * jnp.abs(x))

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        (strength,) = at
        return soft(z, step * strength)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        (strength,) = at
        return _soft_piece(z, step * strength, lambda x, size, strength: jnp.sum(strength * size))


class WeightedL1(AbstractLeafwise):
    """`strength sum_j weights_j |x_j|`: the adaptive lasso.

    **Arguments:** as in `L1`; `weights` are not negative, and an entry of weight zero is free.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.WeightedL1(0.1, weights=lambda theta: jnp.exp(theta))
        ```

    Reference: Zou, "The adaptive lasso and its oracle properties", 2006.
    """

    settings: ClassVar[tuple[str, ...]] = ("strength", "weights")
    is_penalty: ClassVar[bool] = True
    leaves_few: ClassVar[bool] = True
    is_separable: ClassVar[bool] = True

    strength: PyTree = setting(1.0)
    weights: PyTree = setting(1.0)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        strength, weights = at
        return jnp.sum(strength * weights * jnp.abs(x))

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        strength, weights = at
        return soft(z, step * strength * weights)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        strength, weights = at
        return _soft_piece(
            z,
            step * strength * weights,
            lambda x, size, strength, weights: jnp.sum(strength * weights * size),
        )


class ElasticNet(AbstractLeafwise):
    """`l1 ||x||_1 + l2 / 2 ||x||^2`.

    **Arguments:** `l1`, `l2`: as the strength of `L1`.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.ElasticNet(lambda t: jnp.exp(t["l1"]), lambda t: jnp.exp(t["l2"]))
        ```

    Reference: Zou and Hastie, "Regularization and variable selection via the elastic net",
    2005, in the unscaled ("naive") form.
    """

    settings: ClassVar[tuple[str, ...]] = ("l1", "l2")
    is_penalty: ClassVar[bool] = True
    leaves_few: ClassVar[bool] = True
    is_separable: ClassVar[bool] = True

    l1: PyTree = setting(1.0)
    l2: PyTree = setting(1.0)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        l1, l2 = at
        return jnp.sum(l1 * jnp.abs(x)) + 0.5 * jnp.sum(l2 * x**2)

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        l1, l2 = at
        return soft(z, step * l1) / (1 + step * l2)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        return _soft_piece(
            z, step * at[0], lambda x, size, l1, l2: jnp.sum(l1 * size) + 0.5 * jnp.sum(l2 * x**2)
        )
