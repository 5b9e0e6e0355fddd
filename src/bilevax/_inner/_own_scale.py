"""What a small gradient is: small in every variable's own scale.

A zero of a gradient has no scale of its own. The gradient at the start says nothing after
a warm start, and the start itself nothing about a solution that is far smaller; and where
variables are of different size, one norm of all entries sees the stiffest of them only.
A gradient `g` is therefore compared with the terms that cancel in it, `sum_j H_ij z_j`,
`z` the magnitudes of the variables. The error is

    omega = max(||g|| / ||H z||,  rms_i(|g_i| / s_i)),    s_i ~ (sum_j H_ij^2 z_j^2)^(1/2),

the second a componentwise backward error: it does not change if a variable, and with it a
row and a column of `H`, is scaled (Oettli and Prager, "Compatibility of approximate
solution of linear equations with given error bounds", Numer. Math. 6 (1964), theorem 2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._linear._common import largest_entry, signs_like
from .._tree import tree_dot, tree_dtype, tree_larger, tree_norm, tree_scale, tree_size


def own_magnitude(x: PyTree[Array], x0: PyTree[Array]) -> PyTree[Array]:
    """`x`; where it is nothing but the rounding error of a step from `x0`, that error.

    A solution that is exactly zero could not be reached to a relative accuracy otherwise.
    """
    return tree_larger(x, tree_scale(float(jnp.finfo(tree_dtype(x)).eps), x0))


def two_products(
    product: Callable[[PyTree], PyTree], z: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """`H z`, and `H` times `z` with a fixed pattern of signs, as one product of two vectors.

    The squares of both add up to an estimate of the squares of `s`. One alone would not
    do: the terms of a row may cancel in it, as they do in the rows of a linear term that
    happens to be zero.
    """
    if not jtu.tree_leaves(z):
        return z, z
    pair = jtu.tree_map(lambda a: jnp.stack([a, a * signs_like(a)]), z)
    both = jax.vmap(product)(pair)
    return jtu.tree_map(lambda a: a[0], both), jtu.tree_map(lambda a: a[1], both)


def compared_with(gradient: PyTree[Array], plain: PyTree[Array], signed: PyTree[Array]) -> Scalar:
    """`||g|| / omega`, the norm that `g` is compared with, from `two_products`.

    A decision: not differentiated.
    """
    gradient, plain, signed = jax.lax.stop_gradient((gradient, plain, signed))
    # The larger of both and not the root of their squares, which overflow in float32.
    rows = jtu.tree_map(jnp.abs, tree_larger(plain, signed))
    return norm_over_error(gradient, norm(plain), root_mean_square(gradient, rows))


def norm(a: PyTree[Array]) -> Scalar:
    """The two-norm, without the overflow and the underflow of squares.

    A gradient of 1e-200 is not zero, and not small where the objective is of that size.
    """
    largest = largest_entry(a)
    is_usual = (largest > 0) & jnp.isfinite(largest)
    unit = jnp.where(is_usual, largest, 1)
    return unit * tree_norm(jtu.tree_map(lambda x: x / unit, a))


def norm_over_error(gradient: PyTree[Array], size: Scalar, error: Scalar) -> Scalar:
    """`||g|| / omega`, from `||H z||` and the largest error that is not `||g|| / ||H z||`."""
    # No gradient at all: omega is 0/0, and nothing is missing.
    is_zero = error == 0
    own = jnp.where(is_zero, size, norm(gradient) / jnp.where(is_zero, 1, error))
    return jnp.minimum(size, own)


def root_mean_square(a: PyTree[Array], scale: PyTree[Array]) -> Scalar:
    """`rms_i(|a_i| / scale_i)`, in which entries of `a` that are zero err by nothing."""
    ratio = jtu.tree_map(_ratio, a, scale)
    return jnp.sqrt(tree_dot(ratio, ratio) / max(tree_size(a), 1))


def _ratio(a: Array, scale: Array) -> Array:
    # Where there is nothing to compare with, all of it is error.
    largest = jnp.asarray(1 / jnp.finfo(scale.dtype).eps, scale.dtype)
    is_known = scale > 0
    ratio = jnp.where(is_known, jnp.abs(a) / jnp.where(is_known, scale, 1), largest)
    return jnp.where(a == 0, 0, jnp.where(ratio > largest, largest, ratio))
