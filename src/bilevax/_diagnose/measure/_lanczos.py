"""Lanczos with full reorthogonalisation: eigenvalues of a symmetric product, with bounds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from ..._tree import tree_axpy, tree_dot, tree_dtype, tree_norm, tree_scale, tree_size


def tridiagonalise(
    matvec: Callable[[PyTree], PyTree], start: PyTree[Array], num_steps: int
) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Lanczos: the diagonal of `T`, and what stands beside it.

    After `k` steps `A V = V T + beta q e_k'`, `V` orthonormal and `T` tridiagonal; the last
    entry of `beta` is that of the remainder. May be traced: the eigenvalues of `T` are left
    to `ritz_values`, on the host.

    **Cost:** `num_steps` products (at most the number of variables) and as many vectors.

    Reference: Parlett, "The symmetric eigenvalue problem", 1998, section 13.2.
    """
    num_steps = min(num_steps, tree_size(start))
    # A pytree of vectors with a leading axis. Nothing is ravelled, so shards stay in place.
    empty = jtu.tree_map(lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), start)
    numbers = jnp.zeros(num_steps, tree_dtype(start))

    def step(k: Array, carry: tuple) -> tuple:
        basis, q, alpha, beta = carry
        basis = jtu.tree_map(lambda b, x: b.at[k].set(x), basis, q)
        w = matvec(q)
        alpha = alpha.at[k].set(tree_dot(q, w))
        # Twice is enough (Parlett, section 6.9): against all vectors, those to come are zero.
        w = _orthogonalise(basis, _orthogonalise(basis, w))
        norm = tree_norm(w)
        return basis, _normalised(w, norm), alpha, beta.at[k].set(norm)

    first = _normalised(start, tree_norm(start))
    *_, alpha, beta = jax.lax.fori_loop(0, num_steps, step, (empty, first, numbers, numbers))
    return alpha, beta


def ritz_values(
    alpha: np.ndarray, beta: np.ndarray, rounding: float
) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of `T` in ascending order, each with a residual bound.

    With `T s = mu s` the residual of `V s` is `||A V s - mu V s|| = |beta s_k|`, hence the
    interval `mu +- |beta s_k|` contains an eigenvalue of `A`: some eigenvalue, and not
    necessarily the nearest to the end of the spectrum. The smallest Ritz value is never
    below the smallest eigenvalue, the largest never above the largest. `rounding` is the
    precision that `alpha` and `beta` were computed in.

    Reference: Parlett, 1998, section 13.8.
    """
    alpha, beta = alpha.astype(np.float64), beta.astype(np.float64)
    norm = np.max(np.abs(alpha), initial=0.0) + 2 * np.max(beta, initial=0.0)
    # The Krylov space is exhausted where beta is rounding: what follows is noise.
    exhausted = np.flatnonzero(beta <= 10 * len(beta) * rounding * norm)
    size = len(alpha) if len(exhausted) == 0 else exhausted[0] + 1
    beside = np.diag(beta[: size - 1], 1)
    values, vectors = np.linalg.eigh(np.diag(alpha[:size]) + beside + beside.T)
    # T itself is rounded.
    return values, np.abs(beta[size - 1] * vectors[-1]) + 10 * rounding * norm


def largest_singular_value(
    matvec: Callable[[PyTree], PyTree],
    transpose: Callable[[PyTree], PyTree],
    start: PyTree[Array],
    num_steps: int = 10,
) -> Scalar:
    """`||M||` by the power method on `M' M`: a lower estimate, two products a step.

    Ten steps are exact to a few per cent, which is what a constant is needed to.
    """

    def step(_: Array, carry: tuple[PyTree, Scalar]) -> tuple[PyTree, Scalar]:
        product = matvec(_normalised(carry[0], tree_norm(carry[0])))
        return transpose(product), tree_norm(product)

    zero = jnp.zeros((), tree_dtype(start))
    return jax.lax.fori_loop(0, num_steps, step, (start, zero))[1]


def growth_rate(
    matvec: Callable[[PyTree], PyTree], start: PyTree[Array], num_steps: int = 60
) -> Scalar:
    """The spectral radius of a product without symmetry, as the mean growth of its powers.

    `(||M^k u|| / ||M^(k/2) u||)^(2/k)`: the mean smooths the swing of complex pairs.
    """

    def step(k: Array, carry: tuple[PyTree, Scalar]) -> tuple[PyTree, Scalar]:
        product = matvec(carry[0])
        norm = tree_norm(product)
        late = jnp.where(k >= num_steps // 2, jnp.log(jnp.where(norm > 0, norm, 1)), 0)
        log_growth = jnp.where(norm > 0, carry[1] + late, -jnp.inf)
        return _normalised(product, norm), log_growth

    first = _normalised(start, tree_norm(start))
    zero = jnp.zeros((), tree_dtype(start))
    total = jax.lax.fori_loop(0, num_steps, step, (first, zero))[1]
    return jnp.exp(total / (num_steps - num_steps // 2))


def _normalised(x: PyTree[Array], norm: Scalar) -> PyTree[Array]:
    return tree_scale(1 / jnp.where(norm > 0, norm, 1), x)


def _orthogonalise(basis: PyTree[Array], w: PyTree[Array]) -> PyTree[Array]:
    """`w - V V' w`. Full precision also where products of float32 default to less."""
    highest = jax.lax.Precision.HIGHEST

    def overlap(b: Array, x: Array) -> Array:  # b has one axis more, in front
        axes = (tuple(range(1, b.ndim)), tuple(range(x.ndim)))
        return jnp.tensordot(b, x, axes=axes, precision=highest)

    overlaps = jtu.tree_leaves(jtu.tree_map(overlap, basis, w))
    coefficients = sum(overlaps[1:], overlaps[0])
    projection = jtu.tree_map(
        lambda b: jnp.tensordot(coefficients, b, axes=1, precision=highest), basis
    )
    return tree_axpy(-1.0, projection, w)
