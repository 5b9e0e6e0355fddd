"""Lineax' solvers behind an adapter that believes only what it measures."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int, PyTree, Scalar

from .._results import RESULTS
from .._tree import (
    default_rtol,
    dense_columns,
    flat_to_tree,
    has_fourier_transform,
    tree_all_finite,
    tree_astype,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_sub,
    tree_to_flat,
    tree_where,
    tree_zeros_like,
    unbounded,
    working_dtype,
)
from ._base import LinearSolution, verify

# What takes a guess and a preconditioner. LSMR takes a guess too, but from it the answer
# is no longer the one of smallest norm.
_TAKES_OPTIONS = (lx.CG, lx.GMRES, lx.BiCGStab)
NEEDS_DEFINITE = (lx.CG, lx.Cholesky)


def solve_by_lineax(
    solver: lx.AbstractLinearSolver,
    matvec: Callable[[PyTree], PyTree],
    b: PyTree[Array],
    v0: PyTree[Array] | None,
    preconditioner: Callable[[PyTree], PyTree] | None,
    is_symmetric: bool,
) -> LinearSolution:
    """Solve by a Lineax solver, and measure the residual. See `solve_linear`."""
    found = _call(solver, matvec, b, v0, preconditioner, is_symmetric)
    # A failed factorisation gives infinities; whether A is finite, A b says.
    is_finite = tree_all_finite(found.value)
    value = tree_where(is_finite, found.value, tree_zeros_like(b))
    product, probe = matvec(value), matvec(b)
    tolerance = _tolerance(solver, b)
    num_steps = jnp.asarray(found.stats.get("num_steps", 0), jnp.int32)
    num_products = _num_products(solver, num_steps, tree_size(b)) + 1
    norm = jnp.maximum(_ratio(product, value), _ratio(probe, b))  # of A, from below
    if isinstance(solver, lx.LSMR):
        # Its tolerance for consistent systems is relative to ||A|| ||v|| + ||b||.
        norm = jnp.maximum(norm, jnp.asarray(found.stats["norm_A"], norm.dtype))
        allowed = tolerance + jnp.asarray(solver.rtol, norm.dtype) * norm * _ratio(value, b)
    else:
        allowed = tolerance
    solution = LinearSolution(
        value, jnp.zeros_like(norm), allowed, num_steps, num_products, RESULTS.successful
    )
    solution = verify(solution, b, product)
    if not solver.assume_full_rank():
        transposed = matvec if is_symmetric else _transpose(matvec, b)
        residual = tree_sub(b, product)
        angle = _ratio(transposed(residual), residual) / _positive(norm)
        # A factor of ten because the norm of A is an underestimate.
        solution = _allow(solution, is_finite & (angle <= 10 * tolerance))
    result = RESULTS.where(
        solution.result == RESULTS.stalled, _failure(solver, found.result), solution.result
    )
    result = RESULTS.where(tree_all_finite(probe), result, RESULTS.nonfinite)
    return eqx.tree_at(lambda s: s.result, solution, result)


def _call(
    solver: lx.AbstractLinearSolver,
    matvec: Callable[[PyTree], PyTree],
    b: PyTree[Array],
    v0: PyTree[Array] | None,
    preconditioner: Callable[[PyTree], PyTree] | None,
    is_symmetric: bool,
) -> lx.Solution:
    dtype = tree_dtype(b)
    if not _is_iterative(solver) and has_fourier_transform(matvec, b):
        matvec = _by_matrix(matvec, b)  # Lineax would form it from a batch of products
    work = jnp.zeros(()).dtype if isinstance(solver, lx.LSMR) else working_dtype(b)
    if work != dtype:
        # LSMR of Lineax 0.1.1 raises in float32 where float64 is enabled: lax.select with
        # a Python float; the others in half precision. Their vectors are then of another
        # dtype, the products stay as they are.
        matvec, b, v0 = _cast(matvec, dtype, work), *tree_astype((b, v0), work)
        preconditioner = preconditioner and _cast(preconditioner, dtype, work)
    structure = jax.eval_shape(lambda: b)
    tags = [lx.symmetric_tag] if is_symmetric else []
    # Not told to the others: AutoLinearSolver would choose Cholesky, which fails where x is
    # not a minimum; so it chooses LU.
    if isinstance(solver, NEEDS_DEFINITE):
        tags.append(lx.positive_semidefinite_tag)
    options: dict[str, Any] = {}
    if isinstance(solver, _TAKES_OPTIONS):
        if v0 is not None:
            options["y0"] = v0
        if preconditioner is not None:
            options["preconditioner"] = lx.FunctionLinearOperator(
                preconditioner, structure, lx.positive_semidefinite_tag if is_symmetric else ()
            )
    operator = lx.FunctionLinearOperator(matvec, structure, frozenset(tags))
    # Under strict promotion LSMR and the preconditioners of Lineax 0.1.1 raise.
    with jax.numpy_dtype_promotion("standard"):
        found = lx.linear_solve(operator, b, solver, options=options, throw=False)
    return eqx.tree_at(lambda s: s.value, found, tree_astype(found.value, dtype))


def _by_matrix(matvec: Callable, b: PyTree[Array]) -> Callable:
    columns = dense_columns(matvec, b)
    return lambda v: flat_to_tree(tree_to_flat(v) @ columns, b)


def _cast(matvec: Callable, dtype: Any, work: Any) -> Callable:
    return lambda v: tree_astype(matvec(tree_astype(v, dtype)), work)


def _allow(solution: LinearSolution, is_orthogonal: Array) -> LinearSolution:
    """Accept a large residual that is orthogonal to the range: least squares."""
    is_least_squares = (solution.result == RESULTS.stalled) & is_orthogonal
    result = RESULTS.where(is_least_squares, RESULTS.successful, solution.result)
    assert solution.tolerance is not None
    tolerance = jnp.where(is_least_squares, unbounded(solution.tolerance), solution.tolerance)
    return eqx.tree_at(
        lambda s: (s.result, s.tolerance, s.num_products),
        solution,
        (result, tolerance, solution.num_products + 1),
    )


def _failure(solver: lx.AbstractLinearSolver, claim: Any) -> RESULTS:
    """Our name for why the residual is too large, from what Lineax claims."""
    # A direct solver has no tolerance that rounding alone could miss.
    out = RESULTS.stalled if _is_iterative(solver) else RESULTS.singular
    for theirs, ours in (
        (lx.RESULTS.max_steps_reached, RESULTS.adjoint_not_converged),
        (lx.RESULTS.breakdown, RESULTS.adjoint_not_converged),
        (lx.RESULTS.singular, RESULTS.singular),
        (lx.RESULTS.conlim, RESULTS.singular),
    ):
        out = RESULTS.where(claim == theirs, ours, out)
    return out


def _is_iterative(solver: Any) -> bool:
    return hasattr(getattr(solver, "inner_solver", solver), "max_steps")


def _tolerance(solver: Any, b: PyTree[Array]) -> Scalar:
    """The relative residual that `solver` was asked for, or the default."""
    solver = getattr(solver, "inner_solver", solver)
    norm_b = tree_norm(b)
    rtol, atol = getattr(solver, "rtol", default_rtol(b)), getattr(solver, "atol", 0.0)
    # Lineax' atol is per entry.
    per_entry = tree_size(b) ** 0.5 / _positive(norm_b)
    return jnp.asarray(rtol, norm_b.dtype) + jnp.asarray(atol, norm_b.dtype) * per_entry


def _num_products(solver: Any, num_steps: Int[Array, ""], size: int) -> Int[Array, ""]:
    """An estimate."""
    if not _is_iterative(solver):
        return jnp.asarray(size, jnp.int32)  # the matrix, column by column
    if isinstance(solver, lx.GMRES):  # counts restarts
        return num_steps * (solver.restart + 1)
    return num_steps if isinstance(solver, lx.CG) else 2 * num_steps


def _transpose(matvec: Callable, b: PyTree[Array]) -> Callable:
    transposed = jax.linear_transpose(matvec, b)
    return lambda r: transposed(r)[0]


def _ratio(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    return tree_norm(a) / _positive(tree_norm(b))


def _positive(x: Scalar) -> Scalar:
    return jnp.where(x > 0, x, 1)
