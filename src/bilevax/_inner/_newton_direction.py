"""Directions of Newton's method: `H p = b`, as far as `H` and the accuracy allow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._tree import (
    dense_columns,
    flat_to_tree,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_size,
    tree_to_flat,
    tree_zeros_like,
)

Direction = tuple[PyTree[Array], Scalar, Int[Array, ""]]


def cg_direction(
    product: Callable[[PyTree], PyTree], b: PyTree[Array], rtol: Scalar, max_steps: int
) -> Direction:
    """Truncated conjugate gradients: the direction, `||b - H p||`, products.

    Not `CG` of the adjoint systems: the next gradient measures what this one claims, so
    neither a measured residual nor an outcome is wanted, and the code compiles in a third
    of the time. At non-positive curvature the steps so far are the direction; at the
    first step, `b` over the magnitude of the curvature (Nocedal and Wright, "Numerical
    optimization", 2006, algorithm 7.1).
    """
    bb = tree_dot(b, b)

    def body(carry: tuple) -> tuple:
        v, r, p, rr, _, k = carry
        q = product(p)
        curvature = tree_dot(p, q)
        is_convex = curvature > 0
        # a straight line has no scale: a step of length one
        length = jnp.where(curvature < 0, -rr / curvature, jax.lax.rsqrt(rr))
        steepest = jnp.where(k == 0, length, 0)
        alpha = jnp.where(is_convex, rr / jnp.where(is_convex, curvature, 1), steepest)
        v, r = tree_axpy(alpha, p, v), tree_axpy(-alpha, q, r)
        new_rr = tree_dot(r, r)
        return v, r, tree_axpy(new_rr / rr, p, r), new_rr, is_convex, k + 1

    def is_running(carry: tuple) -> Bool[Array, ""]:
        *_, rr, is_convex, k = carry
        return (rr > rtol**2 * bb) & is_convex & (k < max_steps)

    start = (tree_zeros_like(b), b, b, bb, jnp.array(True), jnp.zeros((), jnp.int32))
    v, _, _, rr, _, k = jax.lax.while_loop(is_running, body, start)
    return v, jnp.sqrt(jax.lax.stop_gradient(rr)), k


def dense_direction(
    product: Callable[[PyTree], PyTree], b: PyTree[Array], is_needed: Bool[Array, ""]
) -> Direction:
    """The Hessian column by column, and Cholesky; as many products as variables."""
    size, dtype = tree_size(b), tree_dtype(b)

    def solve() -> PyTree[Array]:
        hessian, flat = dense_columns(product, b), tree_to_flat(b)
        factor = jnp.linalg.cholesky(hessian)
        pivots = jnp.diagonal(factor) ** 2
        # False also where a pivot is not a number: the Hessian is then indefinite.
        is_definite = jnp.min(pivots) > size * jnp.finfo(dtype).eps * jnp.max(pivots)
        direction = jax.lax.cond(
            is_definite,
            lambda: jax.scipy.linalg.cho_solve((factor, True), flat),
            lambda: _saddle_free(hessian, flat),
        )
        return flat_to_tree(direction, b)

    direction = jax.lax.cond(is_needed, solve, lambda: tree_zeros_like(b))
    count = jnp.where(is_needed, size, 0).astype(jnp.int32)
    return direction, jnp.zeros((), dtype), count


def _saddle_free(hessian: Float[Array, "d d"], b: Float[Array, " d"]) -> Float[Array, " d"]:
    """`|H|^-1 b`: Newton steps away from maxima and saddle points.

    Where `H` has no curvature, gradient descent: nothing happens along directions in
    which the objective does not change (Dauphin et al. 2014, arXiv:1406.2572, section 4).
    """
    values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    values = jnp.abs(values)
    largest = jnp.max(values)
    largest = jnp.where(largest > 0, largest, jnp.sqrt(jnp.sum(b * b)))
    is_curved = values > b.size * jnp.finfo(b.dtype).eps * largest
    return vectors @ ((b @ vectors) / jnp.where(is_curved, values, largest))
