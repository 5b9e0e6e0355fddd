"""A randomised low-rank approximation of the Hessian as preconditioner."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_count
from .._linear._in_turn import factorise
from .._linear._subspace import combine, empty_rows, gram, normalised, rows_dot, symmetric
from .._problem import AbstractCondition
from .._tree import tree_all_finite, tree_axpy, tree_dtype, tree_size, tree_sub
from ._base import AbstractPreconditioner, Apply, no_products
from ._probes import products, signs, unit_vectors
from ._refresh import Refresh, never_made


class Nystrom(AbstractPreconditioner):
    """Randomised Nystrom preconditioner: the largest eigenvalues, from one sketch.

    With `Y = A S`, `S` random signs, `A` is approximated by `Y (S'Y)^{-1} Y' = U' D U`, and

        P^{-1} r = (l + rho) U' (D + rho)^{-1} U r + (r - U'U r),    l = min D,

    brings the eigenvalues above `l` down to it, and leaves the others alone.

    **Arguments:**

    - `rank`: the number of products, and of vectors in memory. A rank of the number of
        variables gives `A^{-1}`: for systems that take CG more steps than they have
        variables the cheapest choice of all, if a sequence of them is to be solved.
    - `damping`: `rho`. By default zero: what `A` holds of `rho` is in the estimates `D`.

    `A` must be positive semidefinite; if it is seen not to be, or not to be finite, the
    identity takes its place: then nothing wrong comes out, and CG tells what it meets.

    **Cost:** `rank` products when it is made: at the first solve, and again when the steps
    lost to its age have cost as much. Each use: `4 rank` operations per entry; the
    memory: `rank` vectors, three times that while it is made.

    **Exact when** the rank is the number of variables. Otherwise the condition number
    falls to about that of `A` without its `rank / 2` largest eigenvalues: much where they
    decay fast, nothing where they do not.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.Nystrom(rank=50))
        ```

    Reference: Frangella, Tropp, Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix
    Anal. Appl. 44 (2023), algorithm 2.1 and equation (1.3).
    """

    rank: int
    damping: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_count("Nystrom", required=True, rank=self.rank)
        damping = self.damping
        if isinstance(damping, (int, float)) and not damping >= 0:
            raise ValueError(f"Nystrom(damping=...) must not be negative; got {damping}.")

    def init(self, x: PyTree[Array]) -> "_State":
        rank = self._rank(x)
        values = jnp.zeros((rank,), tree_dtype(x))
        return _State(empty_rows(x, rank), values, jnp.zeros((), bool), never_made())

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
        if not tree_size(x):
            return lambda r: r, state, no_products()
        rank, is_due = self._rank(x), state.refresh.is_due

        def make() -> "_State":
            U, values, is_usable = _sketch(matvec, x, rank)
            return _State(U, values, is_usable, state.refresh.renewed())

        state = jax.lax.cond(is_due, make, lambda: state)
        num_products = jnp.where(is_due, rank, 0).astype(jnp.int32)
        U, damping = state.U, 0.0 if self.damping is None else self.damping
        shrink = 1 - _ratios(state.values, damping)

        def apply(r: PyTree[Array]) -> PyTree[Array]:
            return tree_sub(r, combine(shrink * rows_dot(U, r), U))

        return apply, state, num_products

    def learn(self, state: "_State", num_steps: Int[Array, ""]) -> "_State":
        refresh = state.refresh.learn(num_steps, state.values.size, state.is_usable)
        return eqx.tree_at(lambda s: s.refresh, state, refresh)

    def _rank(self, x: PyTree[Array]) -> int:
        return min(self.rank, tree_size(x))


class _State(eqx.Module):
    U: PyTree[Array]  # orthonormal rows, or zero
    values: Float[Array, " rank"]  # approximate eigenvalues, descending; zero: not used
    is_usable: Bool[Array, ""]
    refresh: Refresh


def _ratios(values: Float[Array, " rank"], damping: float | Scalar) -> Float[Array, " rank"]:
    """`(l + rho) / (d + rho)`, one for a value that is not used."""
    is_used = values > 0
    damping = jnp.asarray(damping, values.dtype)
    smallest = jnp.min(jnp.where(is_used, values, jnp.inf)) + damping
    ratios = smallest / jnp.where(is_used, values + damping, smallest)
    # r - U'U r is zero up to rounding only: below this the sign of r'P^{-1}r is chance.
    return jnp.where(is_used, jnp.maximum(ratios, 100 * float(jnp.finfo(values.dtype).eps)), 1)


def _sketch(
    matvec: Callable[[PyTree], PyTree], x: PyTree[Array], rank: int
) -> tuple[PyTree[Array], Array, Array]:
    """Orthonormal rows `U` and `D` of the Nystrom approximation; whether they may be used."""
    is_exact = rank == tree_size(x)
    S = unit_vectors(x) if is_exact else normalised(signs(x, rank))[0]
    product = products(matvec, S)
    eps = float(jnp.finfo(tree_dtype(x)).eps)
    # 1. A + nu I instead of A, so that rounding does not make it indefinite
    size = jnp.sqrt(jnp.trace(gram(product, product)))
    nu = jnp.sqrt(jnp.asarray(tree_size(x), size.dtype)) * eps * size
    Y = tree_axpy(nu, S, product)
    # 2. B = C^{-1} Y with C C' = S'Y: then A is about B'B, whose eigenvalues are those of B B'
    factor = factorise(jnp.linalg.cholesky, symmetric(gram(S, Y)))
    is_usable = jnp.all(jnp.isfinite(factor))
    inverse = _inverse(jnp.where(is_usable, factor, jnp.eye(rank, dtype=factor.dtype)))
    B = combine(inverse, Y)
    values, vectors = factorise(jnp.linalg.eigh, symmetric(gram(B, B)))
    values, vectors = values[::-1], vectors[:, ::-1]
    # 3. vectors that are noise, because their eigenvalue is a rounding error, go
    is_kept = values > 10 * rank * eps * values[0]
    scale = jnp.where(is_kept, 1 / jnp.sqrt(jnp.where(is_kept, values, 1)), 0)
    rows = _orthonormal(combine(scale[:, None] * vectors.T, B), is_kept)
    values = jnp.where(is_kept, jnp.maximum(values - nu, nu), 0)
    is_usable &= tree_all_finite((rows, values)) & jnp.any(is_kept)
    empty = (empty_rows(x, rank), jnp.zeros_like(values))
    return *jax.lax.cond(is_usable, lambda: (rows, values), lambda: empty), is_usable


def _orthonormal(rows: PyTree[Array], is_kept: Bool[Array, " m"]) -> PyTree[Array]:
    """Cholesky QR: the leading rows, which are the accurate ones, change least."""
    square = symmetric(gram(rows, rows)) + jnp.diag(jnp.where(is_kept, 0.0, 1.0))
    return combine(_inverse(factorise(jnp.linalg.cholesky, square)), rows)


def _inverse(lower: Float[Array, "m m"]) -> Float[Array, "m m"]:
    eye = jnp.eye(lower.shape[0], dtype=lower.dtype)
    return factorise(partial(jax.scipy.linalg.solve_triangular, lower=True), lower, eye)
