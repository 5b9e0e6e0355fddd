"""The memory of L-BFGS: an approximate inverse Hessian in compact form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._tree import tree_dot, tree_dtype


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

    steps: PyTree[Array]
    changes: PyTree[Array]
    inverse: Float[Array, "m m"]  # R^-1
    gram: Float[Array, "m m"]  # Y Y'
    diagonal: Float[Array, " m"]  # D
    length: Scalar  # c
    slot: Int[Array, ""]  # of the next pair

    def add(self, step: PyTree, change: PyTree, is_wanted: Bool[Array, ""]) -> "History":
        """With one more pair, if it is wanted and its curvature is positive."""
        curvature, change_sq = tree_dot(step, change), tree_dot(change, change)
        # Cauchy-Schwarz: the square of a cosine of at least eps.
        least = float(jnp.finfo(curvature.dtype).eps) ** 2 * tree_dot(step, step) * change_sq
        is_new = is_wanted & (curvature > 0) & (curvature**2 > least)
        safe = jnp.where(is_new, curvature, 1)
        steps = jtu.tree_map(lambda x, s: self._put(x, s, is_new), self.steps, step)
        changes = jtu.tree_map(lambda x, y: self._put(x, y, is_new), self.changes, change)

        # [[R, r], [0, s'y]]^-1 = [[R^-1, -R^-1 r / s'y], [0, 1 / s'y]], the oldest deleted
        row = (jnp.arange(self.diagonal.size, dtype=jnp.int32) == self.slot) & is_new
        cross = row[:, None] | row[None, :]
        inverse = jnp.where(cross, 0, self.inverse)
        column = jnp.where(row, 1, -(inverse @ _rows_dot(steps, change))) / safe
        products = _rows_dot(changes, change)
        symmetric = jnp.where(row[None, :], products[:, None], products[None, :])
        return History(
            steps,
            changes,
            inverse=jnp.where(row[None, :], column[:, None], inverse),
            gram=jnp.where(cross, symmetric, self.gram),
            diagonal=jnp.where(row, curvature, self.diagonal),
            length=jnp.where(is_new, curvature / jnp.where(is_new, change_sq, 1), self.length),
            slot=jnp.where(is_new, (self.slot + 1) % self.diagonal.size, self.slot),
        )

    def _put(self, rows: Array, row: Array, is_new: Bool[Array, ""]) -> Array:
        old = jax.lax.dynamic_index_in_dim(rows, self.slot, keepdims=False)
        row = jnp.where(is_new, row, old)
        return jax.lax.dynamic_update_index_in_dim(rows, row, self.slot, 0)

    def direction(self, gradient: PyTree[Array]) -> PyTree[Array]:
        """Minus the approximate inverse Hessian times `gradient`."""
        c = self.length
        u = self.inverse @ _rows_dot(self.steps, gradient)
        w = self.diagonal * u + c * (self.gram @ u - _rows_dot(self.changes, gradient))
        w = w @ self.inverse
        return jtu.tree_map(
            lambda g, s, y: -c * g - jnp.tensordot(w, s, 1) + c * jnp.tensordot(u, y, 1),
            gradient,
            self.steps,
            self.changes,
        )


def empty_history(y: PyTree[Array], num_pairs: int) -> History:
    """No pairs yet, and room for `num_pairs`."""
    dtype = tree_dtype(y)
    rows = jtu.tree_map(lambda x: jnp.zeros((num_pairs, *x.shape), x.dtype), y)
    square, one = jnp.zeros((num_pairs, num_pairs), dtype), jnp.ones((), dtype)
    return History(rows, rows, square, square, square[0], one, jnp.zeros((), jnp.int32))


def _rows_dot(rows: PyTree[Array], x: PyTree[Array]) -> Float[Array, " m"]:
    leaves = zip(jtu.tree_leaves(rows), jtu.tree_leaves(x), strict=True)
    products = [jnp.tensordot(a, b, b.ndim, precision="highest") for a, b in leaves]
    return sum(products[1:], products[0])
