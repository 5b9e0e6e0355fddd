"""The transpose of a preconditioner: `A^{-1}` approximated, for systems with `A^T`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree


def transposed(
    preconditioner: Callable[[PyTree], PyTree], like: PyTree[Array]
) -> Callable[[PyTree], PyTree]:
    """`r -> P^T r` of a linear `preconditioner`, `r -> P r`, for vectors as `like`."""
    structure = jax.eval_shape(lambda: like)
    found = jax.eval_shape(preconditioner, structure)
    if _shapes(found) != _shapes(structure):
        raise ValueError(
            "The preconditioner must return what it is given, a vector like x. Given "
            f"{_shapes(structure)}, it returned {_shapes(found)}."
        )

    def cast(r: PyTree) -> PyTree:
        # A matrix of another precision is no mistake; the transpose would insist.
        return jax.tree_util.tree_map(lambda z, a: z.astype(a.dtype), preconditioner(r), structure)

    transpose = jax.linear_transpose(cast, structure)
    try:
        jax.eval_shape(transpose, structure)
    except Exception as error:
        raise TypeError(
            "The derivative of a Root or FixedPoint condition is not symmetric, so that its "
            "adjoint system needs the transpose of the preconditioner. `preconditioner` "
            "approximates the inverse of A; JAX could not transpose the function r -> z "
            f"({type(error).__name__} by jax.linear_transpose). It must be linear in r and, "
            "for that, free of callbacks and while loops: write it with products with "
            "matrices, solves of jax.numpy.linalg and jax.lax.scan, or give its transpose, "
            "jax.custom_derivatives.linear_call(fn, transpose_fn, residuals, r)."
        ) from error
    return lambda r: transpose(r)[0]


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda a: a.shape, tree)
