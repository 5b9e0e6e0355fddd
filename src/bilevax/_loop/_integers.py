"""Numbers as 64-bit integers, and fractions of integers."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

START_BITS = 50  # of the largest entry at the start; growth by 2^11 is overflow, flagged
_MAX_DENOMINATOR = 2.0**26


def as_fraction(value: Scalar) -> tuple[Array, Array]:
    """`n, d` with `n / d = value`, d as small as may be: the continued fraction."""

    def keep_going(c: tuple) -> Bool[Array, ""]:
        _, n, d, *_ = c
        return jnp.abs(value - n / jnp.where(d == 0, 1, d)) > precision(value) / 2

    def body(c: tuple) -> tuple:
        rest, n, d, old_n, old_d, count = c
        safe = jnp.where(rest == 0, 1, rest)
        term = jnp.round(1 / safe)
        return 1 / safe - term, term * n + old_n, term * d + old_d, n, d, count + 1

    zero, one = jnp.zeros((), value.dtype), jnp.ones((), value.dtype)
    whole = jnp.round(value)
    start = (value - whole, whole, one, one, zero, 0)
    _, n, d, *_ = jax.lax.while_loop(
        lambda c: keep_going(c) & (c[-1] < 40) & (jnp.abs(c[2]) < _MAX_DENOMINATOR), body, start
    )
    sign = jnp.sign(d)
    n, d = (jnp.maximum((sign * a).astype(jnp.int64), 1) for a in (n, d))
    return n, d


def precision(value: Scalar) -> float:
    """Two units in the last place of one."""
    return 2 * float(jnp.finfo(value.dtype).eps)


def power_of_two(size: Scalar) -> Scalar:
    """A power of two that makes `size` a number of `START_BITS` bits."""
    exponent = jnp.ceil(jnp.log2(jnp.where(size > 0, size, 1)))
    exponent = START_BITS - jnp.where(jnp.isfinite(exponent), exponent, 0)
    # Not `exp2`, which is no power of two on older JAX.
    return jnp.ldexp(jnp.ones_like(size), exponent.astype(jnp.int32))


def to_int(tree: PyTree, scale: Scalar) -> PyTree:
    """Every entry times `scale`, rounded."""
    return jtu.tree_map(lambda a: jnp.round(a.astype(scale.dtype) * scale).astype(jnp.int64), tree)


def to_float(tree: PyTree, like: PyTree, scale: Scalar) -> PyTree:
    """The numbers that the integers stand for, in the precisions of `like`."""
    return jtu.tree_map(lambda i, a: (i.astype(scale.dtype) / scale).astype(a.dtype), tree, like)


def largest(tree: PyTree) -> Scalar:
    """The largest absolute value of all entries."""
    sizes = [jnp.max(jnp.abs(a.astype(jnp.float64))) for a in jtu.tree_leaves(tree) if a.size]
    return jnp.max(jnp.stack(sizes)) if sizes else jnp.zeros((), jnp.float64)


def are_equal(a: PyTree, b: PyTree) -> Bool[Array, ""]:
    """Whether all entries are the same."""
    same = jtu.tree_map(lambda x, y: jnp.all(x == y), a, b)
    return jnp.all(jnp.stack(jtu.tree_leaves(same)))
