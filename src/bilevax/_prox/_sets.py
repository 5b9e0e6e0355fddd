"""Sets that x is held in: their terms are zero on them, and infinite elsewhere."""

from typing import ClassVar

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._tree import stop_gradient
from ._base import AbstractLeafwise, LeafPiece, Settings, no_value, on_mask, setting


class _AbstractSet(AbstractLeafwise):
    """A term that is zero where x may be."""

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        del at
        return no_value(x)


class Box(_AbstractSet):
    """`lower <= x <= upper`, entry by entry.

    **Arguments:**

    - `lower`, `upper`: numbers (`-inf` and `inf` for none), arrays of the shape of x, pytrees
        like x of these, or functions of theta that return one.

    x moves with its bounds where it is at one.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        bounds = bx.prox.Box(0.0, lambda theta: jnp.exp(theta))
        ```
    """

    settings: ClassVar[tuple[str, ...]] = ("lower", "upper")
    is_separable: ClassVar[bool] = True

    lower: PyTree = setting(-jnp.inf)
    upper: PyTree = setting(jnp.inf)

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        del step
        lower, upper = at
        return jnp.clip(z, lower, upper)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        del step
        lower, upper = at
        is_low, is_high = z <= lower, z >= upper
        gap = jnp.minimum(jnp.abs(z - lower), jnp.abs(z - upper))
        # Between two bounds that are one there is nothing to leave.
        gap = jnp.where(lower < upper, gap, jnp.inf)
        return on_mask(
            ~(is_low | is_high),
            lambda lower, upper: jnp.where(is_low, lower, upper),
            no_value,
            gap,
            is_low,
        )


class NonNegative(Box):
    """`x >= 0`, entry by entry.

    !!! example

        ```python
        import bilevax as bx

        flows = bx.prox.NonNegative()
        ```
    """

    def __init__(self) -> None:
        super().__init__(0.0, jnp.inf)


class Simplex(_AbstractSet):
    """`x >= 0` with `sum(x) = total`, of each leaf.

    **Arguments:** `total`: a positive number, or a function of theta that returns one.

    !!! example

        ```python
        import bilevax as bx

        weights = bx.prox.Simplex()
        ```

    Reference: Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the
    l1-ball for learning in high dimensions", 2008.
    """

    settings: ClassVar[tuple[str, ...]] = ("total",)

    total: PyTree = setting(1.0)

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        del step
        (total,) = at
        return _on_simplex(z, total)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        del step
        (total,) = at
        x = _on_simplex(z, total)
        is_free = x > 0
        return _on_sum(is_free, jnp.ones_like(z), jnp.min(jnp.abs(z - _level(z, x, is_free))))


class L1Ball(_AbstractSet):
    """`||x||_1 <= radius`, of each leaf.

    **Arguments:** `radius`: a positive number, or a function of theta that returns one.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        ball = bx.prox.L1Ball(lambda theta: jnp.exp(theta))
        ```

    Reference: as `Simplex`.
    """

    settings: ClassVar[tuple[str, ...]] = ("radius",)

    radius: PyTree = setting(1.0)

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        del step
        (radius,) = at
        is_inside = jnp.sum(jnp.abs(z)) <= radius
        return jnp.where(is_inside, z, jnp.sign(z) * _on_simplex(jnp.abs(z), radius))

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        del step
        (radius,) = at
        size, signs = jnp.abs(z), jnp.sign(z)
        is_inside = jnp.sum(size) <= radius
        x = _on_simplex(size, radius)
        level = jnp.min(jnp.abs(size - _level(size, x, x > 0)))
        gap = jnp.abs(jnp.sum(size) - radius)
        return _unless(is_inside, _on_sum(x > 0, signs, jnp.minimum(level, gap)), gap, z.size)


class L2Ball(_AbstractSet):
    """`||x|| <= radius`, of each leaf.

    **Arguments:** `radius`: a positive number, or a function of theta that returns one.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        ball = bx.prox.L2Ball(lambda theta: jnp.exp(theta))
        ```
    """

    settings: ClassVar[tuple[str, ...]] = ("radius",)

    radius: PyTree = setting(1.0)

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        del step
        (radius,) = at
        size = _norm(z)
        return jnp.where(size <= radius, z, z * (radius / _divisor(size)))

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        del step
        (radius,) = at
        size = _norm(z)

        def along(x: Array, g: Array) -> Array:
            return g - x * (jnp.sum(x * g) / _divisor(_norm(x)) ** 2)

        sphere = LeafPiece(
            place=lambda x, radius: x * (radius / _divisor(_norm(x))),
            tangent=along,
            smooth=no_value,
            gap=jnp.abs(size - radius),
            num_free=jnp.asarray(z.size - 1, jnp.int32),
            tag=(),
        )
        return _unless(size <= radius, sphere, sphere.gap, z.size)


def _on_simplex(z: Array, total: Array) -> Array:
    """The projection, differentiated as what it is on the entries that it leaves."""
    flat = stop_gradient(jnp.ravel(z))
    largest = -jnp.sort(-flat)
    sums = jnp.cumsum(largest) - stop_gradient(total)
    counts = jnp.arange(1, flat.size + 1).astype(z.dtype)
    num = jnp.sum(largest * counts > sums)
    is_free = stop_gradient(z) > sums[num - 1] / counts[num - 1]
    level = (jnp.sum(jnp.where(is_free, z, 0)) - total) / num.astype(z.dtype)
    return jnp.where(is_free, jnp.maximum(z - level, 0), 0)


def _level(z: Array, x: Array, is_free: Array) -> Scalar:
    """What the projection takes from every entry that it leaves above zero."""
    num = jnp.maximum(jnp.sum(is_free), 1).astype(z.dtype)
    return jnp.sum(jnp.where(is_free, z - x, 0)) / num


def _on_sum(is_free: Array, signs: Array, gap: Scalar) -> LeafPiece:
    """Some entries free, the others zero, and `signs' x` of the free ones given."""
    normal = jnp.where(is_free, signs, 0)
    num = jnp.maximum(jnp.sum(is_free), 1).astype(normal.dtype)

    def place(x: Array, total: Array) -> Array:
        x = jnp.where(is_free, x, 0)
        return x + normal * ((total - jnp.sum(normal * x)) / num)

    def tangent(x: Array, g: Array) -> Array:
        del x
        g = jnp.where(is_free, g, 0)
        return g - normal * (jnp.sum(normal * g) / num)

    num_free = jnp.sum(is_free, dtype=jnp.int32) - 1
    return LeafPiece(place, tangent, no_value, gap, num_free, (is_free, normal > 0))


def _unless(is_inside: Array, boundary: LeafPiece, gap: Scalar, size: int) -> LeafPiece:
    """`boundary`, or the inside, where every entry is free."""
    return LeafPiece(
        place=lambda x, *at: jnp.where(is_inside, x, boundary.place(x, *at)),
        tangent=lambda x, g: jnp.where(is_inside, g, boundary.tangent(x, g)),
        smooth=no_value,
        gap=jnp.where(is_inside, gap, boundary.gap),
        num_free=jnp.where(is_inside, size, boundary.num_free).astype(jnp.int32),
        tag=(
            is_inside,
            jtu.tree_map(lambda a: jnp.where(is_inside, jnp.zeros_like(a), a), boundary.tag),
        ),
    )


def _norm(z: Array) -> Scalar:
    """The two-norm, whose derivative at zero is zero."""
    square = jnp.sum(z**2)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def _divisor(size: Scalar) -> Scalar:
    return jnp.where(size > 0, size, 1)
