"""One entry for every linear solver: ours, and Lineax' through a checking adapter."""

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
    tree_all_finite,
    tree_norm,
    tree_size,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution, verify
from ._cg import CG
from ._gradient_descent import GradientDescent
from ._neumann import Neumann

# What takes a guess and a preconditioner. LSMR takes a guess too, but from it the answer
# is no longer the one of smallest norm.
_TAKES_OPTIONS = (lx.CG, lx.GMRES, lx.BiCGStab)
_NEEDS_DEFINITE = (lx.CG, lx.Cholesky)


def solve_linear(
    solver: lx.AbstractLinearSolver,
    matvec: Callable[[PyTree], PyTree],
    b: PyTree[Array],
    v0: PyTree[Array] | None = None,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
    is_symmetric: bool = True,
) -> LinearSolution:
    """Solve `A v = b` by any solver. The caller passes the outcome to `verify`.

    Our solvers report their own residual. Lineax' solvers report too little to be
    believed (a NaN in `A` gives zeros and "successful"), so the residual is measured here
    already, at two or three products, and decides: below twice the tolerance the outcome
    is `successful`, whatever was claimed. Their tolerance is their `rtol` and `atol`;
    direct solvers have the default `rtol`, and failing it are `singular`. Of `lx.Normal`
    the residual itself is judged, not the one of the normal equations.

    Solvers that do not assume full rank (`lx.LSMR`, `lx.SVD`,
    `lx.AutoLinearSolver(well_posed=False)`) return the least-squares solution of smallest
    norm. If the system is inconsistent the residual `r` is not small, then success is
    `||A'r|| <= 10 rtol ||A|| ||r||`, and the residual is reported, not flagged.

    The number of products is exact for our solvers, an estimate for Lineax'.
    """
    if isinstance(solver, AbstractIterativeLinearSolver):
        if not is_symmetric:
            solver = _for_nonsymmetric(solver)
        return solver.solve(matvec, b, v0, preconditioner)
    return _solve_lineax(solver, matvec, b, v0, preconditioner, is_symmetric)


def _for_nonsymmetric(solver: AbstractIterativeLinearSolver) -> AbstractIterativeLinearSolver:
    if isinstance(solver, CG):
        raise ValueError(_needs_symmetric("CG"))  # noqa: TRY004  a wrong problem, not a wrong type
    if isinstance(solver, (GradientDescent, Neumann)) and solver.step_size is None:
        # The largest eigenvalue says nothing about convergence here; for A = I - T' one does.
        return eqx.tree_at(lambda s: s.step_size, solver, 1.0, is_leaf=lambda x: x is None)
    return solver


def _needs_symmetric(name: str) -> str:
    return (
        f"{name} needs a symmetric positive definite system, but the derivative of a Root or "
        "FixedPoint condition is not symmetric. Use lx.GMRES(rtol=..., atol=...), "
        "lx.BiCGStab(...) or, with few variables, lx.LU()."
    )


def _solve_lineax(
    solver: lx.AbstractLinearSolver,
    matvec: Callable[[PyTree], PyTree],
    b: PyTree[Array],
    v0: PyTree[Array] | None,
    preconditioner: Callable[[PyTree], PyTree] | None,
    is_symmetric: bool,
) -> LinearSolution:
    if isinstance(solver, _NEEDS_DEFINITE) and not is_symmetric:
        raise ValueError(_needs_symmetric(f"lx.{type(solver).__name__}"))
    structure = jax.eval_shape(lambda: b)
    tags = [lx.symmetric_tag] if is_symmetric else []
    # Told of other solvers, AutoLinearSolver would choose Cholesky, which fails if x is
    # not a minimum; it then chooses LU.
    if isinstance(solver, _NEEDS_DEFINITE):
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
    # lx.LSMR mixes dtypes in float32.
    with jax.numpy_dtype_promotion("standard"):
        found = lx.linear_solve(operator, b, solver, options=options, throw=False)
    # A failed factorisation gives infinities; whether A is finite, A b says.
    is_finite = tree_all_finite(found.value)
    value = tree_where(is_finite, found.value, tree_zeros_like(b))
    product, probe = matvec(value), matvec(b)
    num_steps = jnp.asarray(found.stats.get("num_steps", 0), jnp.int32)
    num_products = _num_products(solver, num_steps, tree_size(b)) + 1
    solution = LinearSolution(
        value, jnp.zeros(()), _tolerance(solver, b), num_steps, num_products, RESULTS.successful
    )
    solution = verify(solution, b, product)
    if not solver.assume_full_rank():
        transposed = matvec if is_symmetric else _transpose(matvec, b)
        norm = jnp.asarray(found.stats.get("norm_A", 0.0), solution.residual.dtype)
        norm = jnp.maximum(norm, jnp.maximum(_ratio(product, value), _ratio(probe, b)))
        solution = _least_squares(solution, tree_sub(b, product), transposed, norm)
    result = RESULTS.where(
        solution.result == RESULTS.stalled, _failure(solver, found.result), solution.result
    )
    result = RESULTS.where(tree_all_finite(probe), result, RESULTS.nonfinite)
    return eqx.tree_at(lambda s: s.result, solution, result)


def _least_squares(
    solution: LinearSolution, residual: PyTree[Array], transposed: Callable, norm: Scalar
) -> LinearSolution:
    """`solution`, successful also where its large residual is orthogonal to the range.

    `norm` is an estimate of `||A||`, from below; hence the factor 10.
    """
    angle = _ratio(transposed(residual), residual) / _positive(norm)
    is_least = (solution.result == RESULTS.stalled) & (angle <= 10 * solution.tolerance)
    return eqx.tree_at(
        lambda s: (s.result, s.tolerance, s.num_products),
        solution,
        (
            RESULTS.where(is_least, RESULTS.successful, solution.result),
            jnp.where(is_least, jnp.inf, solution.tolerance),
            solution.num_products + 1,
        ),
    )


def _failure(solver: lx.AbstractLinearSolver, claim: Any) -> RESULTS:
    """Our name for why the residual is too large, from what Lineax claims."""
    # A direct solver has no tolerance that could be missed by rounding alone.
    is_iterative = hasattr(solver, "max_steps") or isinstance(solver, lx.Normal)
    out = RESULTS.stalled if is_iterative else RESULTS.singular
    for theirs, ours in (
        (lx.RESULTS.max_steps_reached, RESULTS.adjoint_not_converged),
        (lx.RESULTS.breakdown, RESULTS.adjoint_not_converged),
        (lx.RESULTS.singular, RESULTS.singular),
        (lx.RESULTS.conlim, RESULTS.singular),
    ):
        out = RESULTS.where(claim == theirs, ours, out)
    return out


def _tolerance(solver: Any, b: PyTree[Array]) -> Scalar:
    """The relative residual that `solver` was asked for, or the default."""
    solver = getattr(solver, "inner_solver", solver)
    norm_b = tree_norm(b)
    rtol, atol = getattr(solver, "rtol", default_rtol(b)), getattr(solver, "atol", 0.0)
    # Lineax' atol is per entry.
    atol = atol * tree_size(b) ** 0.5 / _positive(norm_b)
    return jnp.asarray(rtol + atol, norm_b.dtype)


def _num_products(solver: Any, num_steps: Int[Array, ""], size: int) -> Int[Array, ""]:
    if isinstance(solver, lx.GMRES):  # counts restarts
        return num_steps * (solver.restart + 1)
    if isinstance(getattr(solver, "inner_solver", solver), (lx.BiCGStab, lx.LSMR)):
        return 2 * num_steps
    if isinstance(solver, lx.Normal) and hasattr(solver.inner_solver, "max_steps"):
        return 2 * num_steps
    if isinstance(solver, lx.CG):
        return num_steps
    return jnp.asarray(size, jnp.int32)  # the matrix, column by column


def _transpose(matvec: Callable, b: PyTree[Array]) -> Callable:
    transposed = jax.linear_transpose(matvec, b)
    return lambda r: transposed(r)[0]


def _ratio(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    return tree_norm(a) / _positive(tree_norm(b))


def _positive(x: Scalar) -> Scalar:
    return jnp.where(x > 0, x, 1)


def default_linear_solver(is_symmetric: bool) -> lx.AbstractLinearSolver:
    """`CG()` for symmetric systems, otherwise `lx.GMRES`."""
    if is_symmetric:
        return CG()
    rtol = 1e-6 if jnp.zeros(()).dtype == jnp.float64 else 1e-4
    return lx.GMRES(rtol=rtol, atol=0.0, restart=20)
