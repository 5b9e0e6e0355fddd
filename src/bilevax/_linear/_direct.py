"""The matrix column by column, and its eigenvalues: exact verdicts for small systems."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._results import RESULTS
from .._tree import (
    default_rtol,
    dense_columns,
    flat_to_tree,
    tree_dtype,
    tree_scale,
    tree_size,
    tree_to_flat,
    unbounded,
    where_needed,
    working_dtype,
)
from ._base import AbstractDirectLinearSolver, LinearSolution
from ._common import of_order_one, scaled_start, without_steps
from ._in_turn import in_turn

# Eigenvalues below this many rounding errors, per variable, count as zero. The columns err
# by a few each (more where they sum over many samples), the factorisation by about one for
# every variable; and a zero that is taken for an eigenvalue costs more than the reverse.
_ROUNDING = 4.0
# Two variables have rounding errors too.
_FEW = 8


class Direct(AbstractDirectLinearSolver):
    """`v = A^+ b` from the eigenvalues of the matrix, which is formed column by column.

    For small systems, or many right-hand sides: they share one factorisation under `vmap`.
    Rows and columns are first scaled to entries of order one (by the roots of a symmetric
    diagonal), so that the units of the variables do not matter. An eigenvalue is then
    zero if it is below `max(4 size eps, asymmetry)` times the largest, `asymmetry` being
    the relative difference between the matrix and its transpose, which is nothing but the
    rounding errors of the products.

    **Arguments:**

    - `minimum_norm`: the least-squares solution of smallest norm, in the units of the
        variables; inconsistent systems are accepted, their residual reported, not flagged.
    - `indefinite`: accept negative eigenvalues, as saddle points have on purpose.
    - `is_symmetric`: `False` takes singular values instead, without a verdict on
        curvature. Roots, fixed points and operators of Lineax choose by themselves.

    **Returns** (from `solve`): a `LinearSolution`; the value is a least-squares
    solution, whatever the outcome. A guess or a preconditioner is not used.
    Outcomes: `negative_curvature` (there is a negative eigenvalue, whether `b` sees it or
    not), `singular` (`b` is not in the range), `stalled` (so ill-conditioned that the
    residual is above the default tolerance), `nonfinite`.

    **Cost:** `size + 1` products, `10 size^3` operations; the matrix twice.

    **Exact when** the products are exact; one step of iterative refinement leaves a
    residual of a few rounding errors.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.Direct(minimum_norm=True).solve(lambda v: A @ v, b)
        ```

    Reference: Golub and Van Loan, "Matrix computations" (2013), sections 5.5.1 and 8.3.
    """

    minimum_norm: bool = False
    indefinite: bool = False
    is_symmetric: bool = True

    def for_nonsymmetric(self) -> "Direct":
        return dataclasses.replace(self, is_symmetric=False)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        del v0, preconditioner
        return self.factorise(matvec, b).solve(b)

    def factorise(self, matvec: Callable[[PyTree], PyTree], like: PyTree[Array]) -> "Factorised":
        """What all systems with this matrix share; `like` is of the shape of a solution."""
        size, dtype = tree_size(like), tree_dtype(like)
        if size == 0:
            return Factorised(self, matvec, None, jnp.array(True))
        columns = dense_columns(matvec, like).astype(working_dtype(like))
        is_known = jnp.all(jnp.isfinite(columns))
        columns = jnp.where(is_known, columns, 0)
        spectrum = in_turn(partial(self._spectrum, dtype=dtype), size)(columns)
        return Factorised(self, matvec, spectrum, is_known)

    def _spectrum(self, columns: Float[Array, "d d"], dtype: Any) -> "_Spectrum":
        return (_eigenvalues if self.is_symmetric else _singular_values)(columns, dtype)

    def compute(self, state: Any, vector: PyTree[Array], options: dict[str, Any]) -> Any:
        is_symmetric = self.is_symmetric and lx.is_symmetric(state)
        solver = dataclasses.replace(self, is_symmetric=is_symmetric)
        return AbstractDirectLinearSolver.compute(solver, state, vector, options)

    def assume_full_rank(self) -> bool:
        return not self.minimum_norm


class Factorised(NamedTuple):
    """A matrix, its spectrum, and what is solved with it."""

    solver: Direct
    matvec: Callable[[PyTree], PyTree]
    spectrum: "_Spectrum | None"  # none of no variables
    is_known: Bool[Array, ""]

    def solve(self, b: PyTree[Array]) -> LinearSolution:
        """See `Direct`."""
        solver, matvec, spectrum = self.solver, self.matvec, self.spectrum
        scale, b, *_ = scaled_start(matvec, b, None)
        if spectrum is None:
            return without_steps(b, jnp.zeros(()), jnp.zeros(()), 0, RESULTS.successful)
        dtype, work = tree_dtype(b), working_dtype(b)
        flat = tree_to_flat(b).astype(work)
        # What b is has no part in the factorisation: one serves a batch of them.
        is_finite = self.is_known & jnp.all(jnp.isfinite(flat))
        flat = jnp.where(is_finite, flat, 0)

        def refined(spectrum: _Spectrum) -> Float[Array, " d"]:
            first = spectrum.solve(flat)
            product = tree_to_flat(matvec(flat_to_tree(first.astype(dtype), b)))
            change = spectrum.solve(flat - product.astype(work))
            # False also where the product is not a number.
            is_better = jnp.sum(change**2) <= 0.25 * jnp.sum(first**2)
            return first + jnp.where(is_better, change, 0)

        value = refined(spectrum)
        if solver.minimum_norm:
            # A regular matrix, whose answer is unique, is not to pay for the projections.
            value = where_needed(
                jnp.any(spectrum.is_zero),
                lambda: refined(spectrum.with_projections(solver.is_symmetric)),
                value,
            )

        # Backward error: v solves a system that differs from this one by rounding.
        missing = _norm(spectrum.outside(flat))
        norm_b, norm_v = _norm(spectrum.rows * flat), _norm(value / spectrum.columns)
        is_inside = missing <= spectrum.relative * norm_b + spectrum.threshold * norm_v
        relative = missing / jnp.where(norm_b > 0, norm_b, 1)
        tolerance = jnp.full_like(relative, default_rtol(b))
        is_inside &= relative <= tolerance
        if solver.minimum_norm:
            result = RESULTS.successful
            tolerance = jnp.where(is_inside, tolerance, unbounded(tolerance))
        else:
            result = RESULTS.where(is_inside, RESULTS.successful, RESULTS.singular)
        if not solver.indefinite:
            result = RESULTS.where(spectrum.is_negative, RESULTS.negative_curvature, result)
        result = RESULTS.where(is_finite, result, RESULTS.nonfinite)
        value = tree_scale(scale, flat_to_tree(value.astype(dtype), b))
        relative, tolerance = relative.astype(dtype), tolerance.astype(dtype)
        return without_steps(value, relative, tolerance, tree_size(b) + 1, result)

    def relative_step(self, residual: PyTree[Array], x: PyTree[Array]) -> Scalar:
        """`||A^+ r|| / ||x||` of a symmetric matrix, in the units in which its diagonal is one.

        The length of the Newton step at `x` where the gradient is `r` and `A` the Hessian,
        relative to `x`. The units of the variables do not matter.
        """
        spectrum, work = self.spectrum, working_dtype(x)
        if spectrum is None:
            return jnp.zeros((), work)
        flat, x = (tree_to_flat(a).astype(work) for a in (residual, x))
        step, size = _norm(spectrum.solve(flat) / spectrum.columns), _norm(x / spectrum.columns)
        return step / jnp.where(size > 0, size, 1)

    def size_of_product(self, x: PyTree[Array]) -> Scalar:
        """`||A x||` of a symmetric matrix."""
        spectrum, work = self.spectrum, working_dtype(x)
        if spectrum is None:
            return jnp.zeros((), work)
        inside = (tree_to_flat(x).astype(work) / spectrum.columns) @ spectrum.right
        return _norm(spectrum.left @ (spectrum.values * inside) / spectrum.rows)


class _Spectrum(NamedTuple):
    """`diag(rows) A diag(columns) = left diag(values) right'`.

    Values of no more than `threshold` are zeros.
    """

    left: Float[Array, "d d"]
    values: Float[Array, " d"]
    right: Float[Array, "d d"]
    rows: Float[Array, " d"]
    columns: Float[Array, " d"]
    relative: Scalar
    threshold: Scalar
    is_negative: Bool[Array, ""]
    # Onto what is not in the range, and onto the null space, in the units of the variables.
    not_range: Float[Array, "d d"] | None = None
    null: Float[Array, "d d"] | None = None

    @property
    def is_zero(self) -> Bool[Array, " d"]:
        return jnp.abs(self.values) <= self.threshold

    def with_projections(self, is_symmetric: bool) -> "_Spectrum":
        """The spectrum whose `solve` is that of the pseudo-inverse."""
        project = in_turn(_projection, len(self.values))
        null = project(self.right * self.columns[:, None], self.is_zero)
        left = self.left * self.rows[:, None]
        not_range = null if is_symmetric else project(left, self.is_zero)
        return self._replace(null=null, not_range=not_range)

    def solve(self, b: Float[Array, " d"]) -> Float[Array, " d"]:
        """`A^-1 b`, or `A^+ b`: of the part in the range, the solution without a null part."""
        inverse = jnp.where(self.is_zero, 0, 1 / jnp.where(self.is_zero, 1, self.values))
        inside = b if self.not_range is None else b - self.not_range @ b
        v = self.columns * (self.right @ (inverse * ((self.rows * inside) @ self.left)))
        return v if self.null is None else v - self.null @ v

    def outside(self, b: Float[Array, " d"]) -> Float[Array, " d"]:
        """The parts of the scaled `b` that are not in the range."""
        return jnp.where(self.is_zero, (self.rows * b) @ self.left, 0)


def _projection(vectors: Float[Array, "d d"], is_chosen: Bool[Array, " d"]) -> Float[Array, "d d"]:
    """The orthogonal projection onto the span of the chosen columns."""
    length = jnp.sqrt(jnp.sum(vectors**2, axis=0))
    basis = jnp.where(is_chosen, 1 / jnp.where(length > 0, length, 1), 0)[None, :] * vectors
    gram = basis.T @ basis + jnp.diag(jnp.where(is_chosen, 0, 1).astype(basis.dtype))
    factor = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factor, basis.T, left_side=True, lower=True)
    return half.T @ half


def _eigenvalues(columns: Float[Array, "d d"], dtype: Any) -> _Spectrum:
    diagonal = jnp.sqrt(jnp.abs(jnp.diagonal(columns)))
    unit = 1 / jnp.where(diagonal > 0, diagonal, 1)
    columns = columns * jnp.outer(unit, unit)
    symmetric = (columns + columns.T) / 2
    values, vectors = jnp.linalg.eigh(symmetric, symmetrize_input=False)
    largest = jnp.max(jnp.abs(values))
    # The Frobenius norm of what symmetrising removed: as much may be wrong in what remains.
    asymmetry = jnp.sqrt(jnp.sum((columns - symmetric) ** 2))
    relative = _relative(columns, dtype) + asymmetry / jnp.where(largest > 0, largest, 1)
    threshold = relative * largest
    is_negative = jnp.min(values) < -threshold
    return _Spectrum(vectors, values, vectors, unit, unit, relative, threshold, is_negative)


def _singular_values(columns: Float[Array, "d d"], dtype: Any) -> _Spectrum:
    # `columns` is the transpose: its columns are the rows of A.
    scaled, of_columns, of_rows = of_order_one(columns)
    right, values, left = jnp.linalg.svd(scaled)
    relative = _relative(columns, dtype)
    threshold = relative * jnp.max(values)
    no = jnp.zeros((), bool)
    return _Spectrum(left.T, values, right, of_rows, of_columns, relative, threshold, no)


def _norm(a: Float[Array, " d"]) -> Scalar:
    return jnp.sqrt(jnp.sum(a**2))


def _relative(columns: Float[Array, "d d"], dtype: Any) -> Scalar:
    """The rounding errors of products in `dtype`, and of their factorisation."""
    relative = _ROUNDING * max(columns.shape[0], _FEW) * float(jnp.finfo(columns.dtype).eps)
    if columns.dtype != dtype:
        relative += float(jnp.finfo(dtype).eps)
    return jnp.asarray(relative, columns.dtype)
