"""LU factorisation of the matrix column by column, with an estimate of its condition."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._results import RESULTS
from .._tree import (
    default_rtol,
    dense_columns,
    flat_to_tree,
    tree_dtype,
    tree_scale,
    tree_size,
    tree_to_flat,
    working_dtype,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import of_order_one, scaled_start, without_steps
from ._in_turn import in_turn

# Steps of the inverse power method; a start without a part in the weakest direction is unlikely.
_POWER_STEPS = 2
# Of rounding errors, per variable.
_ROUNDING = 4.0


class LU(AbstractIterativeLinearSolver):
    """`v = A^-1 b` by an LU factorisation of the matrix, which is formed column by column.

    For systems of moderate size that are not symmetric or not definite, such as the KKT system
    of a `bx.ConstrainedMinimum`, whose default it is: far cheaper than `Direct`, whose
    spectrum says whether the system has a solution all the same. Rows and columns are first scaled
    to entries of order one.

    **Returns** (from `solve`): a `LinearSolution`. A guess or a preconditioner is not used.
    Outcomes: `singular` (the smallest singular value, estimated by the inverse power method, is
    below `4 size eps` times the norm of the scaled matrix, whether `b` sees it or not),
    `stalled` (the residual is above the default tolerance), `nonfinite`.

    **Cost:** `size + 1` products, `size^3` operations; the matrix twice.

    **Exact when** the products are exact, up to the condition of the matrix.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[0.0, 1.0], [2.0, 1.0]])
        solution = bx.linear.LU().solve(lambda v: A @ v, jnp.array([1.0, 0.0]))
        ```

    Reference: Golub and Van Loan, "Matrix computations" (2013), sections 3.4 and 3.5.
    """

    def for_nonsymmetric(self) -> "LU":
        return self

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        del v0, preconditioner
        scale, b, *_ = scaled_start(matvec, b, None)
        size, dtype, work = tree_size(b), tree_dtype(b), working_dtype(b)
        flat = tree_to_flat(b).astype(work)
        is_singular, residual = jnp.array(False), jnp.zeros((), work)
        value, is_finite = flat, jnp.all(jnp.isfinite(flat))
        if size:
            matrix = dense_columns(matvec, b).astype(work).T
            is_finite &= jnp.all(jnp.isfinite(matrix))
            matrix = jnp.where(is_finite, matrix, jnp.eye(size, dtype=work))
            flat = jnp.where(is_finite, flat, 0)
            value, weakest = in_turn(_solve, size)(matrix, flat)
            is_singular = ~(weakest > _ROUNDING * size * float(jnp.finfo(dtype).eps))
            norm = jnp.linalg.norm(flat)
            left = jnp.linalg.norm(flat - matrix @ value)
            residual = left / jnp.where(norm > 0, norm, 1)
        tolerance = jnp.full_like(residual, default_rtol(b))
        result = RESULTS.where(residual <= tolerance, RESULTS.successful, RESULTS.stalled)
        result = RESULTS.where(is_singular, RESULTS.singular, result)
        result = RESULTS.where(is_finite, result, RESULTS.nonfinite)
        value = tree_scale(scale, flat_to_tree(value.astype(dtype), b))
        residual, tolerance = residual.astype(dtype), tolerance.astype(dtype)
        return without_steps(value, residual, tolerance, size + 1, result)


class Pivoted(NamedTuple):
    """`diag(rows) A diag(columns) = P L U`, the entries of the scaled matrix of order one."""

    factors: tuple[Array, Array]
    rows: Float[Array, " d"]
    columns: Float[Array, " d"]
    norm: Scalar

    def solve(self, b: Float[Array, " d"]) -> Float[Array, " d"]:
        """`A^-1 b`."""
        return self.columns * jax.scipy.linalg.lu_solve(self.factors, self.rows * b)

    def weakest(self) -> tuple[Scalar, Float[Array, " d"]]:
        """The smallest singular value of the scaled matrix, relative, and its scaled direction."""
        size = self.rows.size
        # As a number of the program: older JAX makes constants of what starts at one.
        start = jnp.cos((1 + jnp.arange(size, dtype=self.rows.dtype)) ** 2)

        def step(_: Array, carry: tuple[Scalar, Array]) -> tuple[Scalar, Array]:
            left = jax.scipy.linalg.lu_solve(self.factors, carry[1], trans=1)
            left /= jnp.linalg.norm(left)
            right = jax.scipy.linalg.lu_solve(self.factors, left)
            length = jnp.linalg.norm(right)
            return 1 / (length * self.norm), right / length

        first = jnp.ones_like(self.norm), start / jnp.linalg.norm(start)
        value, right = jax.lax.fori_loop(0, _POWER_STEPS, step, first)
        return value, right


def pivoted(matrix: Float[Array, "d d"]) -> Pivoted:
    """The LU factorisation."""
    scaled, rows, columns = of_order_one(matrix)
    norm = jnp.linalg.norm(scaled)
    factors, order = jax.scipy.linalg.lu_factor(scaled)
    # A pivot of zero would leave no number, and no direction to name.
    pivots, least = jnp.diagonal(factors), float(jnp.finfo(matrix.dtype).eps) * norm
    raised = jnp.where(jnp.abs(pivots) < least, least, pivots)
    return Pivoted((factors + jnp.diag(raised - pivots), order), rows, columns, norm)


def _solve(matrix: Float[Array, "d d"], b: Float[Array, " d"]) -> tuple[Array, Scalar]:
    at = pivoted(matrix)
    value = at.solve(b)
    change = at.solve(b - matrix @ value)
    is_better = jnp.sum(change**2) <= 0.25 * jnp.sum(value**2)
    return value + jnp.where(is_better, change, 0), at.weakest()[0]
