"""What a small gradient is: small in every variable's own scale.

A zero of a gradient has no scale of its own. The gradient at the start says nothing after
a warm start, and the start itself nothing about a solution that is far smaller; and where
variables are of different size, one norm of all entries sees the stiffest of them only.
A gradient `g` is therefore compared with the terms that cancel in it, `sum_j H_ij z_j`,
`z` the magnitudes of the variables. The error is

    omega = max(||g|| / ||H z||,  rms_i(|g_i| / (c s_i))),    s_i ~ (sum_j H_ij^2 z_j^2)^(1/2),

the second a componentwise backward error: it does not change if a variable, and with it a
row and a column of `H`, is scaled (Oettli and Prager, "Compatibility of approximate
solution of linear equations with given error bounds", Numer. Math. 6 (1964), theorem 2).
They compare with `sum_j |H_ij z_j|`, which products cannot tell: of n terms it is up to
`sqrt(n)` times `s_i`. Hence `c = min(sqrt(n), 5)`, n the number of variables.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._tree import (
    largest_entry,
    tree_dot,
    tree_dtype,
    tree_larger,
    tree_norm,
    tree_scale,
    tree_size,
    tree_weights,
)


def own_magnitude(x: PyTree[Array], x0: PyTree[Array]) -> PyTree[Array]:
    """`x`; where it is nothing but the rounding error of a step from `x0`, that error.

    A solution that is exactly zero could not be reached to a relative accuracy otherwise.
    """
    return tree_larger(x, tree_scale(float(jnp.finfo(tree_dtype(x)).eps), x0))


# The largest `c`: of a row with few terms it is too lenient, and without it a row with many
# takes up to a third more gradients than the bound asks for.
_LARGEST_FACTOR = 5.0


# So many products with weights: after one, two or three rows of a hundred seem to have less
# than a fifth of their size, and a gradient that is small is sent for two or three more steps.
_WEIGHTINGS = 2


class Compared(NamedTuple):
    """What a gradient is compared with."""

    scale: Scalar  # ||g|| / omega; where that is enough, ||H z||
    plain: Scalar  # ||H z||
    num_products: Int[Array, ""]


def compare(
    gradient: PyTree[Array],
    product: Callable[[PyTree], PyTree],
    z: PyTree[Array],
    is_enough: Callable[[Scalar], Bool[Array, ""]] | None = None,
) -> Compared:
    """Compare a gradient with the terms that cancel in it. A decision: not differentiated.

    One Hessian product, `H z`, whose entries are at most the sizes of the rows: what is
    small in comparison with them is small. Up to `_WEIGHTINGS` more, with fixed weights of
    both signs, where that is not so although `is_enough(||H z||)`, the tolerance in one norm
    of all entries, is met: the terms of a row may cancel in `H z`, as they do where an entry
    of the linear term happens to be zero. Without `is_enough` always all of them.
    """
    if not jtu.tree_leaves(z):
        zero = jnp.zeros(())
        return Compared(zero, zero, jnp.zeros((), jnp.int32))
    gradient, rows = jax.lax.stop_gradient((gradient, product(z)))
    plain = norm(rows)

    factor = min(max(tree_size(z), 1) ** 0.5, _LARGEST_FACTOR)

    def by_rows(rows: PyTree) -> Scalar:
        return norm_over_error(gradient, plain, root_mean_square(gradient, rows) / factor)

    def look(seen: tuple) -> tuple:
        rows, _, count = seen
        start = tree_size(z) * jnp.asarray(count - 1, jnp.uint32)
        weighted = jax.lax.stop_gradient(product(_weighted(z, start)))
        # The larger of both and not the root of their squares, which overflow in float32.
        rows = tree_larger(rows, weighted)
        return rows, by_rows(rows), count + 1

    one = jnp.asarray(1, jnp.int32)
    if is_enough is None:
        seen = rows, by_rows(rows), one
        for _ in range(_WEIGHTINGS):
            seen = look(seen)
        return Compared(seen[1], plain, seen[2])

    enough = is_enough(plain)

    def is_open(scale: Scalar) -> Bool[Array, ""]:
        return enough & ~is_enough(scale)

    def row_by_row() -> tuple[Scalar, Int[Array, ""]]:
        # A loop and not conditions: of a batch these take all their branches, and a loop ends.
        _, scale, count = jax.lax.while_loop(
            lambda seen: is_open(seen[1]) & (seen[2] <= _WEIGHTINGS),
            look,
            (rows, by_rows(rows), one),
        )
        # One number that does not depend on how the rest of a gradient is distributed.
        return jnp.where(is_open(scale), scale, plain), count

    scale, count = jax.lax.cond(enough, row_by_row, lambda: (plain, one))
    return Compared(scale, plain, count)


def _weighted(z: PyTree[Array], start: Array) -> PyTree[Array]:
    """`z` with weights of both signs, those of the sequence from `start` on.

    Signs alone are not enough: in a row of three entries, of a chain, every fourth pattern
    has equal signs, and what cancels in `H z` cancels again.
    """
    return jtu.tree_map(jnp.multiply, z, tree_weights(z, start))


def norm(a: PyTree[Array]) -> Scalar:
    """The two-norm, without the overflow and the underflow of squares.

    A gradient of 1e-200 is not zero, and not small where the objective is of that size.
    """
    largest = largest_entry(a)
    is_usual = (largest > 0) & jnp.isfinite(largest)
    unit = jnp.where(is_usual, largest, 1)
    # Not `unit * `: XLA computes `a` anew wherever it is used, fused in other ways and so
    # rounded otherwise. Where `a` is all rounding, `unit` may be one in one place only.
    return largest * tree_norm(jtu.tree_map(lambda x: x / unit, a))


def norm_over_error(gradient: PyTree[Array], size: Scalar, error: Scalar) -> Scalar:
    """`||g|| / omega`, from `||H z||` and the largest error that is not `||g|| / ||H z||`."""
    # No gradient at all: omega is 0/0, and nothing is missing.
    is_zero = error == 0
    own = jnp.where(is_zero, size, norm(gradient) / jnp.where(is_zero, 1, error))
    comparable = jnp.minimum(size, own)
    # Where even H z has overflowed, x has run away: any gradient is small beside infinity.
    return jnp.where(jnp.isposinf(comparable), 0, comparable)


def root_mean_square(a: PyTree[Array], scale: PyTree[Array]) -> Scalar:
    """`rms_i(|a_i / scale_i|)`, in which entries of `a` that are zero err by nothing."""
    ratio = jtu.tree_map(_ratio, a, scale)
    return jnp.sqrt(tree_dot(ratio, ratio) / max(tree_size(a), 1))


def _ratio(a: Array, scale: Array) -> Array:
    # Where there is nothing to compare with, all of it is error.
    scale = jnp.abs(scale)
    largest = jnp.asarray(1 / float(jnp.finfo(scale.dtype).eps), scale.dtype)
    is_known = scale > 0
    ratio = jnp.where(is_known, jnp.abs(a) / jnp.where(is_known, scale, 1), largest)
    return jnp.where(a == 0, 0, jnp.where(ratio > largest, largest, ratio))
