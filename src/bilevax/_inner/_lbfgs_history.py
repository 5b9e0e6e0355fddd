"""The memory of L-BFGS: an approximate inverse Hessian in compact form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._tree import tree_dtype


class History(eqx.Module):
    """The last pairs of steps `s` and changes of the gradient `y`, in a ring.

    With `S`, `Y` the pairs as rows, `R` the upper triangle of `S Y'` in order of age and
    `D` its diagonal, the approximate inverse Hessian is

        c I + [S', c Y'] [R^-T (D + c Y Y') R^-1,  -R^-T] [S  ]
                         [-R^-1,                    0   ] [c Y]

    with `c = s'y / y'y` of the newest pair (Byrd, Nocedal and Schnabel 1994,
    "Representations of quasi-Newton matrices", equation (3.1)). `R^-1` itself is kept:
    forgetting the oldest pair deletes a row and a column of it, a new pair adds one. So
    nothing is solved and nothing is shifted, and the row of an empty slot is zero.
    """

    rows: PyTree[Array]  # (2 m, ...): those of S and Y in turn
    inverse: Float[Array, "m m"]  # R^-1, and 1 / D on its diagonal
    gram: Float[Array, "m m"]  # Y Y'
    length: Scalar  # c
    slot: Int[Array, ""]  # of the next pair

    def add(self, step: PyTree, change: PyTree, is_wanted: Bool[Array, ""]) -> "History":
        """With one more pair, if it is wanted and its curvature is positive."""
        pair = jtu.tree_map(lambda s, y: jnp.stack([s, y]), step, change)
        (step_sq, curvature), (_, change_sq) = _gram(pair)
        # Cauchy-Schwarz: the square of a cosine of at least eps.
        least = float(jnp.finfo(curvature.dtype).eps) ** 2 * step_sq * change_sq
        is_convex = (curvature > 0) & (curvature**2 > least)
        curvature, change_sq = jnp.where(is_convex, jnp.stack([curvature, change_sq]), 1)
        is_new = is_wanted & is_convex
        rows = jtu.tree_map(lambda rows, new: self._put(rows, new, is_new), self.rows, pair)
        with_steps, with_changes = _in_turn(_rows_dot(rows, change))

        # [[R, r], [0, s'y]]^-1 = [[R^-1, -R^-1 r / s'y], [0, 1 / s'y]], the oldest deleted
        row = (jnp.arange(with_steps.size, dtype=jnp.int32) == self.slot) & is_new
        cross = row[:, None] | row[None, :]
        inverse = jnp.where(cross, 0, self.inverse)
        column = jnp.where(row, 1, -(inverse @ with_steps)) / curvature
        symmetric = jnp.where(row[None, :], with_changes[:, None], with_changes[None, :])
        return History(
            rows,
            inverse=jnp.where(row[None, :], column[:, None], inverse),
            gram=jnp.where(cross, symmetric, self.gram),
            length=jnp.where(is_new, curvature / change_sq, self.length),
            slot=jnp.where(is_new, (self.slot + 1) % row.size, self.slot),
        )

    def _put(self, rows: Array, pair: Array, is_new: Bool[Array, ""]) -> Array:
        first = 2 * self.slot
        old = jax.lax.dynamic_slice_in_dim(rows, first, 2)
        pair = jnp.where(is_new, pair, old)
        return jax.lax.dynamic_update_slice_in_dim(rows, pair, first, 0)

    def direction(self, gradient: PyTree[Array]) -> PyTree[Array]:
        """Minus the approximate inverse Hessian times `gradient`."""
        c = self.length
        with_steps, with_changes = _in_turn(_rows_dot(self.rows, gradient))
        u = self.inverse @ with_steps
        # D u, from 1 / D; an empty slot has neither.
        inverse_diagonal = jnp.diagonal(self.inverse)
        is_full = inverse_diagonal != 0
        w = jnp.where(is_full, u / jnp.where(is_full, inverse_diagonal, 1), 0)
        w = (w + c * (self.gram @ u - with_changes)) @ self.inverse
        weights = jnp.stack([-w, c * u], axis=1).reshape(-1)
        return jtu.tree_map(lambda g, p: jnp.tensordot(weights, p, 1) - c * g, gradient, self.rows)


def empty_history(y: PyTree[Array], num_pairs: int) -> History:
    """No pairs yet, and room for `num_pairs`."""
    dtype = tree_dtype(y)
    rows = jtu.tree_map(lambda x: jnp.zeros((2 * num_pairs, *x.shape), x.dtype), y)
    square, one = jnp.zeros((num_pairs, num_pairs), dtype), jnp.ones((), dtype)
    return History(rows, square, square, one, jnp.zeros((), jnp.int32))


def _rows_dot(rows: PyTree[Array], x: PyTree[Array]) -> Array:
    """Inner products of `x` with what stands in the first axes of `rows`."""
    leaves = zip(jtu.tree_leaves(rows), jtu.tree_leaves(x), strict=True)
    products = [jnp.tensordot(a, b, b.ndim, precision="highest") for a, b in leaves]
    return sum(products[1:], products[0])


def _in_turn(products: Float[Array, " 2m"]) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Those with the steps, and those with the changes."""
    return products[0::2], products[1::2]


def _gram(pair: PyTree[Array]) -> Float[Array, "2 2"]:
    """Inner products of a step and a change with each other."""
    leaves = [(a, tuple(range(1, a.ndim))) for a in jtu.tree_leaves(pair)]
    products = [jnp.tensordot(a, a, (axes, axes), precision="highest") for a, axes in leaves]
    return sum(products[1:], products[0])
