"""Directions of Newton's method: `H p = b`, as far as `H` and the accuracy allow."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._linear._in_turn import in_turn
from .._tree import (
    dense_columns,
    flat_to_tree,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_size,
    tree_to_flat,
    tree_zeros_like,
    working_dtype,
)
from ._own_scale import norm, norm_over_error, root_mean_square

# A gradient below so many units of rounding of its scale is rounding alone.
ROUNDING = 100
# Of a variable's own scale, where rounding errors keep it from being better.
ENOUGH = 1e-2
# The rounding errors of an entry of the Hessian, and of its factorisation, for each variable.
_FEW = 10

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


class DenseNewton(NamedTuple):
    """A Newton step from the whole Hessian, and what the matrix tells of the gradient."""

    direction: PyTree[Array]
    scale: Scalar  # what the norm of the gradient is compared with
    num_products: Int[Array, ""]


def dense_newton(
    product: Callable[[PyTree], PyTree],
    gradient: PyTree[Array],
    z: PyTree[Array],
    rtol: Scalar | float,
    plain: Scalar,
    may_be_done: Bool[Array, ""],
    is_needed: Bool[Array, ""],
) -> DenseNewton:
    """The Hessian column by column, and Cholesky; as many products as variables.

    The matrix is known here, so that the accuracy of the point is, too: the Newton step,
    entry by entry, over the variable it moves. Where the gradient is nothing but
    rounding errors no more can be had, and a hundredth of every variable will do. That is
    looked at only where the point `may_be_done`, compared with `plain`, `||H z||`.
    """
    size, dtype, work = tree_size(gradient), tree_dtype(gradient), working_dtype(gradient)

    def solve() -> tuple[Array, Scalar]:
        columns = dense_columns(product, gradient).astype(work)
        g, magnitude = (tree_to_flat(a).astype(work) for a in (gradient, z))
        step = in_turn(_step, size)(columns, -g)
        fixed = jax.lax.stop_gradient((columns, g, magnitude, step))
        scale = jax.lax.cond(
            may_be_done, lambda: _compared_with(*fixed, rtol).astype(dtype), lambda: plain
        )
        return step.astype(dtype), scale

    nothing = jnp.zeros(size, dtype), jnp.zeros((), dtype)
    step, scale = jax.lax.cond(is_needed, solve, lambda: nothing)
    count = jnp.where(is_needed, size, 0).astype(jnp.int32)
    return DenseNewton(flat_to_tree(step, gradient), scale, count)


def _compared_with(
    hessian: Float[Array, "d d"],
    g: Float[Array, " d"],
    z: Float[Array, " d"],
    step: Float[Array, " d"],
    rtol: Scalar | float,
) -> Scalar:
    """See `_own_scale.py`; the error is also that of x itself, the Newton step over it."""
    eps = float(jnp.finfo(g.dtype).eps)
    rtol = jnp.maximum(rtol, eps).astype(g.dtype)
    rows = jnp.abs(hessian) @ jnp.abs(z)
    backward = root_mean_square(g, rows)
    # A variable that is zero by chance errs by the rounding errors of the others.
    unit = _unit(hessian)
    rounding = ROUNDING * eps * jnp.max(unit * jnp.abs(z)) / unit
    forward = root_mean_square(step, jnp.abs(z) + rounding / rtol)
    is_floor = jnp.all(jnp.abs(g) <= ROUNDING * eps * rows)
    forward = jnp.where(is_floor, forward * rtol / jnp.maximum(rtol, ENOUGH), forward)
    return norm_over_error(g, norm(hessian @ z), jnp.maximum(backward, forward))


def _unit(hessian: Float[Array, "d d"]) -> Float[Array, " d"]:
    """One over the length in which the curvature measures each variable."""
    diagonal = jnp.sqrt(jnp.abs(jnp.diagonal(hessian)))
    return jnp.where(diagonal > 0, diagonal, 1)


def _step(columns: Float[Array, "d d"], b: Float[Array, " d"]) -> Float[Array, " d"]:
    """`H^-1 b`; where `H` is not definite, what `_saddle_free` says.

    Every variable is measured in the length that its curvature gives it: whether a matrix
    is singular is otherwise a question of units.
    """
    unit = jax.lax.stop_gradient(_unit(columns))
    scaled = columns / jnp.outer(unit, unit)
    symmetric = (scaled + scaled.T) / 2
    # The Hessian errs by what makes it asymmetric, and by a few rounding errors.
    asymmetry = jnp.sqrt(jnp.sum((scaled - symmetric) ** 2))
    noise = jax.lax.stop_gradient(_FEW * b.size * float(jnp.finfo(b.dtype).eps) + asymmetry)
    factor = jax.lax.linalg.cholesky(symmetric, symmetrize_input=False)
    # One over the sum of the inverse eigenvalues: pivots err by more than rounding where
    # those before them are small. False also where one is not a number: it is indefinite.
    inverse = jax.lax.linalg.triangular_solve(
        factor, jnp.eye(b.size, dtype=b.dtype), left_side=True, lower=True
    )
    is_definite = jax.lax.stop_gradient(jnp.sum(inverse**2)) * noise < 1
    return jax.lax.cond(
        is_definite,
        lambda: inverse.T @ (inverse @ (b / unit)) / unit,
        lambda: _saddle_free(columns, b, noise),
    )


def _saddle_free(
    hessian: Float[Array, "d d"], b: Float[Array, " d"], noise: Scalar
) -> Float[Array, " d"]:
    """`|H|^-1 b`: Newton steps away from maxima and saddle points.

    Where `H` has no curvature, gradient descent: nothing happens along directions in
    which the objective does not change (Dauphin et al. 2014, arXiv:1406.2572, section 4).
    In the user's own units: of all solutions the one nearest to the start is meant.
    """
    values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
    values = jnp.abs(values)
    largest = jnp.max(values)
    is_curved = values > noise * largest
    largest = jnp.where(largest > 0, largest, jnp.sqrt(jnp.sum(b * b)))
    return vectors @ ((b @ vectors) / jnp.where(is_curved, values, largest))
