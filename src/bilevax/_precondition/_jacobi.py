"""The diagonal of the Hessian as preconditioner."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._checks import check_count
from .._problem import AbstractCondition
from .._tree import tree_size
from ._base import AbstractPreconditioner, Apply, no_products
from ._probes import products, signs, unit_vectors
from ._refresh import Refresh, never_made

_EXACT_SIZE, _NUM_PROBES = 64, 16


class Jacobi(AbstractPreconditioner):
    """The diagonal of `A`: `z = r / diag(A)`, entry by entry.

    Exact, from the products with the unit vectors, up to 64 variables (or `num_probes`);
    beyond, estimated from random signs `s_k` as the mean of `s_k * (A s_k)`. An entry that
    the estimate does not tell from zero (less than twice its standard error) is replaced
    by the root of the mean of the squares, an estimate of the norm of its row, which is
    never less than the entry; one that is zero or not finite, by the mean of the others.

    **Arguments:**

    - `num_probes`: the number of products for the estimate, by default 16.

    **Cost:** `num_probes` products, or one per variable; then nothing, until the steps lost
    to the age of the diagonal have cost as much as a new one. Two vectors.

    **Exact when** `A` is diagonal: then CG takes one step. It helps where the variables
    have different scales, and only there.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.Jacobi())
        ```

    Reference: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", Appl.
    Numer. Math. 57 (2007), equation (2).
    """

    num_probes: int | None = None

    def __check_init__(self) -> None:
        check_count("Jacobi", num_probes=self.num_probes)

    def init(self, x: PyTree[Array]) -> "_State":
        return _State(jtu.tree_map(jnp.ones_like, x), never_made())

    def prepare(
        self,
        matvec: Callable[[PyTree], PyTree],
        condition: AbstractCondition,
        x: PyTree[Array],
        theta: PyTree,
        inner_state: PyTree,
        state: "_State",
    ) -> tuple[Apply, "_State", Int[Array, ""]]:
        del condition, theta, inner_state
        if not jtu.tree_leaves(x):
            return lambda r: r, state, no_products()
        is_due = state.refresh.is_due

        def make() -> "_State":
            return _State(self._diagonal(matvec, x), state.refresh.renewed())

        state = jax.lax.cond(is_due, make, lambda: state)
        num_products = jnp.where(is_due, self._num_products(x), 0).astype(jnp.int32)

        def apply(r: PyTree[Array]) -> PyTree[Array]:
            return jtu.tree_map(jnp.divide, r, state.diagonal)

        return apply, state, num_products

    def learn(self, state: "_State", num_steps: Int[Array, ""]) -> "_State":
        cost = self._num_products(state.diagonal)
        refresh = state.refresh.learn(num_steps, cost, jnp.ones((), bool))
        return _State(state.diagonal, refresh)

    def _is_exact(self, x: PyTree[Array]) -> bool:
        return tree_size(x) <= (_EXACT_SIZE if self.num_probes is None else self.num_probes)

    def _num_products(self, x: PyTree[Array]) -> int:
        return tree_size(x) if self._is_exact(x) else self.num_probes or _NUM_PROBES

    def _diagonal(self, matvec: Callable[[PyTree], PyTree], x: PyTree[Array]) -> PyTree[Array]:
        is_exact = self._is_exact(x)
        probes = unit_vectors(x) if is_exact else signs(x, self._num_products(x))
        parts = jtu.tree_map(jnp.multiply, probes, products(matvec, probes))
        if is_exact:
            return _positive(jtu.tree_map(lambda a: jnp.sum(a, 0), parts))
        return _positive(jtu.tree_map(_safe_mean, parts))


class _State(eqx.Module):
    diagonal: PyTree[Array]
    refresh: Refresh


def _safe_mean(samples: Array) -> Array:
    """The mean over the probes where it is clearly positive, else the root mean square."""
    mean, square = jnp.mean(samples, 0), jnp.mean(samples**2, 0)
    error = jnp.sqrt(jnp.maximum(square - mean**2, 0) / max(samples.shape[0] - 1, 1))
    return jnp.where(mean > 2 * error, mean, jnp.sqrt(square))


def _positive(diagonal: PyTree[Array]) -> PyTree[Array]:
    """`diagonal`, with the mean of the good entries where it is not positive and finite."""

    def is_good(a: Array) -> Array:
        return (a > 0) & jnp.isfinite(a)

    leaves = jtu.tree_leaves(diagonal)
    total = jnp.sum(jnp.stack([jnp.sum(jnp.where(is_good(a), a, 0)) for a in leaves]))
    count = jnp.sum(jnp.stack([jnp.sum(is_good(a)) for a in leaves]))
    mean = total / jnp.maximum(count, 1).astype(total.dtype)
    mean = jnp.where(is_good(mean), mean, 1)
    return jtu.tree_map(lambda a: jnp.where(is_good(a), a, mean.astype(a.dtype)), diagonal)
