"""Vectors for sketching: fixed patterns of signs, or all the unit vectors."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._tree import map_rows, tree_size

# So many products at once: enough for a matrix product, little enough for the memory.
_BATCH = 32


def signs(x: PyTree[Array], num_rows: int) -> PyTree[Array]:
    """Rows of signs without visible order, different ones for every leaf."""
    leaves, structure = jtu.tree_flatten(x)
    rows = [_signs((num_rows, *leaf.shape), leaf.dtype, seed) for seed, leaf in enumerate(leaves)]
    return jtu.tree_unflatten(structure, rows)


def unit_vectors(x: PyTree[Array]) -> PyTree[Array]:
    """The unit vectors as rows, in the order of the leaves."""
    leaves, structure = jtu.tree_flatten(x)
    total, rows, offset = tree_size(x), [], 0
    for leaf in leaves:
        eye = jnp.eye(total, leaf.size, -offset, leaf.dtype)
        rows.append(eye.reshape(total, *leaf.shape))
        offset += leaf.size
    return jtu.tree_unflatten(structure, rows)


def products(matvec: Callable[[PyTree], PyTree], rows: PyTree[Array]) -> PyTree[Array]:
    """`A` times every row."""
    num_rows = jtu.tree_leaves(rows)[0].shape[0]
    return map_rows(matvec, rows, batch_size=None if num_rows <= _BATCH else _BATCH)


def _signs(shape: tuple[int, ...], dtype: jnp.dtype, seed: int) -> Array:
    """The last round of MurmurHash3: every bit of the number decides every bit of the hash."""
    size = 1
    for length in shape:
        size *= length
    h = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32((seed + 1) * 0x9E3779B9 % 2**32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    sign = 1 - 2 * (h >> 31).astype(jnp.int32)
    return sign.astype(dtype).reshape(shape)
