"""A subspace taken out of a linear system by its preconditioner."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._results import RESULTS
from .._tree import map_rows, tree_norm, tree_sub
from ._base import LinearSolution
from ._in_turn import factorise
from ._subspace import combine, gram, rows_dot, symmetric

# Curvature this many rounding errors from zero is not an accident of rounding.
_ROUNDING = 100.0


class Kept(eqx.Module):
    """A subspace between two systems: rows of norm one, zero before the first solve."""

    W: PyTree[Array]
    is_filled: Bool[Array, ""]


class Deflation(NamedTuple):
    """What `W` and `A W` know of `A`."""

    W: PyTree[Array]
    AW: PyTree[Array]
    inverse: Float[Array, "m m"]  # (W'A W)^{-1}, on the part where it is well defined
    scale: Scalar  # s
    is_indefinite: Bool[Array, ""]
    num_products: Int[Array, ""]
    preconditioner: Callable[[PyTree], PyTree]

    def apply(self, r: PyTree[Array]) -> PyTree[Array]:
        """`(P' M P + s W (W'A W)^{-1} W') r`."""
        c = self.inverse @ rows_dot(self.W, r)
        z = self.preconditioner(tree_sub(r, combine(c, self.AW)))
        c = self.scale * c - self.inverse @ rows_dot(self.AW, z)
        return jtu.tree_map(jnp.add, z, combine(c, self.W))

    def improve(self, v: PyTree[Array], r: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        """The iterate of least energy in `v + span W`, and its residual: no product."""
        c = self.inverse @ rows_dot(self.W, r)
        return jtu.tree_map(jnp.add, v, combine(c, self.W)), tree_sub(r, combine(c, self.AW))

    def judge(self, solution: LinearSolution) -> LinearSolution:
        """With what `W` says of `A`, and the products with `W`."""
        is_hidden = self.is_indefinite & (solution.result == RESULTS.successful)
        result = RESULTS.where(is_hidden, RESULTS.negative_curvature, solution.result)
        num_products = solution.num_products + self.num_products
        return eqx.tree_at(lambda s: (s.result, s.num_products), solution, (result, num_products))


def deflate(
    matvec: Callable[[PyTree], PyTree],
    preconditioner: Callable[[PyTree], PyTree] | None,
    kept: Kept,
) -> Deflation:
    """The deflation of `A` by what was kept; the products with it, unless there is nothing."""
    W, is_filled = kept.W, kept.is_filled
    precondition = (lambda r: r) if preconditioner is None else preconditioner
    # Not evaluated at the zeros of the first call.
    AW = jax.lax.cond(is_filled, lambda: map_rows(matvec, W), lambda: W)
    energy = symmetric(gram(W, AW))
    energy = jnp.where(jnp.all(jnp.isfinite(energy)), energy, 0)
    values, vectors = factorise(jnp.linalg.eigh, energy)
    rank, eps = values.size, float(jnp.finfo(values.dtype).eps)
    floor = _ROUNDING * rank * eps * jnp.max(jax.vmap(tree_norm)(AW))
    is_indefinite = values[0] < -floor
    # With an indefinite A nothing is deflated: CG judges it by itself.
    is_used = is_filled & (values > floor) & ~is_indefinite
    inverses = jnp.where(is_used, 1 / jnp.where(is_used, values, 1), 0)
    inverse = (vectors * inverses[None, :]) @ vectors.T
    # A mean, weighted by A, of the eigenvalues of M A on W
    size = jnp.sum(jnp.diag(gram(AW, jax.vmap(precondition)(AW))))
    is_used = jnp.any(is_used) & (size > 0) & jnp.isfinite(size)
    scale = jnp.where(is_used, size / jnp.where(is_used, jnp.trace(energy), 1), 1)
    num_products = jnp.where(is_filled, rank, 0).astype(jnp.int32)
    return Deflation(W, AW, inverse, scale, is_indefinite, num_products, precondition)
