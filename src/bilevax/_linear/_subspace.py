"""A few vectors as the rows of a pytree, and the best eigenvectors among them."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._tree import tree_norm
from ._in_turn import factorise


def rows_dot(rows: PyTree[Array], x: PyTree[Array]) -> Float[Array, " m"]:
    """The inner product of every row with `x`."""
    leaves = zip(jtu.tree_leaves(rows), jtu.tree_leaves(x), strict=True)
    products = [jnp.tensordot(a, b, b.ndim, precision="highest") for a, b in leaves]
    return sum(products[1:], products[0])


def gram(a: PyTree[Array], b: PyTree[Array]) -> Float[Array, "m n"]:
    """The inner product of every row of `a` with every row of `b`."""
    leaves = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    products = [_gram(x, y) for x, y in leaves]
    return sum(products[1:], products[0])


def _gram(x: Array, y: Array) -> Array:
    axes = tuple(range(1, x.ndim))
    return jnp.tensordot(x, y, (axes, axes), precision="highest")


def combine(weights: Float[Array, "... m"], rows: PyTree[Array]) -> PyTree[Array]:
    """The sum of the rows with these weights; with a matrix, one sum for each of its rows."""
    return jtu.tree_map(
        lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1, precision="highest"), rows
    )


def normalised(rows: PyTree[Array], *others: PyTree[Array]) -> tuple[PyTree[Array], ...]:
    """`rows` of norm one, zero rows left alone, and `others` divided by the same numbers."""
    norms = jax.vmap(tree_norm)(rows)
    norms = jnp.where(norms > 0, norms, 1)
    return tuple(
        jtu.tree_map(lambda x: x / norms.reshape(-1, *[1] * (x.ndim - 1)), tree)
        for tree in (rows, *others)
    )


def symmetric(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """Its symmetric part."""
    return 0.5 * (matrix + matrix.T)


def smallest_ritz(
    basis: PyTree[Array], products: PyTree[Array], rank: int
) -> tuple[PyTree[Array], ...]:
    """The Ritz vectors of the `rank` smallest Ritz values, as rows, and `A` times them.

    `products` is `A` times `basis`, so that no further product is needed. Rayleigh-Ritz:
    with `G = Z Z'` and `E = Z A Z'` for the rows `Z`, the vectors `c' Z` with
    `E c = h G c`. Directions in which the basis is dependent up to the root of the
    rounding unit are left out; where fewer than `rank` remain the rest is zero.
    """
    basis, products = normalised(basis, products)
    values, vectors = factorise(jnp.linalg.eigh, symmetric(gram(basis, basis)))
    is_kept = values > float(jnp.finfo(values.dtype).eps) ** 0.5 * values[-1]
    scale = jnp.where(is_kept, 1 / jnp.sqrt(jnp.where(is_kept, values, 1)), 0)
    whitened = vectors * scale[None, :]
    projected = symmetric(whitened.T @ gram(basis, products) @ whitened)
    # What was left out goes to the end.
    last = 2 * jnp.sqrt(jnp.sum(projected**2)) + 1
    _, vectors = factorise(jnp.linalg.eigh, projected + jnp.diag(jnp.where(is_kept, 0, last)))
    weights = (whitened @ vectors[:, :rank]).T
    return normalised(combine(weights, basis), combine(weights, products))


def empty_rows(x: PyTree[Array], num_rows: int) -> PyTree[Array]:
    """Rows of zeros in the structure of `x`."""
    return jtu.tree_map(lambda a: jnp.zeros((num_rows, *a.shape), a.dtype), x)


def put_row(rows: PyTree[Array], row: PyTree[Array], slot: Array) -> PyTree[Array]:
    """`rows` with `row` in place of number `slot`."""
    return jtu.tree_map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, slot, 0), rows, row)


def append(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """The rows of `a`, then those of `b`."""
    return jtu.tree_map(lambda x, y: jnp.concatenate([x, y]), a, b)
