"""One entry for every linear solver, ours and Lineax'."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import lineax as lx
from jaxtyping import Array, PyTree

from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._cg import CG
from ._chebyshev import Chebyshev
from ._direct import Direct
from ._gmres import GMRES
from ._gradient_descent import GradientDescent
from ._lineax import NEEDS_DEFINITE, solve_by_lineax
from ._minres import MINRES
from ._neumann import Neumann
from ._recycled import Recycled

# Up to this size the whole spectrum costs no more than conjugate gradients, and tells more.
DIRECT_SIZE = 32


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
    believed (a NaN in `A` gives zeros and "successful"), so theirs is measured here
    already, at two or three products, and decides: below twice the tolerance the outcome
    is `successful`, whatever was claimed. Their tolerance is their `rtol` and `atol`;
    direct solvers have the default `rtol`, and failing it are `singular`. Of `lx.Normal`
    the residual itself is judged, not the one of the normal equations.

    Solvers that do not assume full rank (`lx.LSMR`, `lx.SVD`,
    `lx.AutoLinearSolver(well_posed=False)`) return the least-squares solution of smallest
    norm. If the system is inconsistent the residual `r` is not small; then success is
    `||A'r|| <= 10 rtol ||A|| ||r||`, and the residual is reported, not flagged.

    A guess and a preconditioner go to the solvers that take them (ours; `lx.CG`,
    `lx.GMRES`, `lx.BiCGStab`). The number of products is exact for our solvers, an
    estimate for Lineax'.
    """
    if not is_symmetric:
        solver = _for_nonsymmetric(solver)
    if isinstance(solver, AbstractIterativeLinearSolver):
        return solver.solve(matvec, b, v0, preconditioner)
    return solve_by_lineax(solver, matvec, b, v0, preconditioner, is_symmetric)


def resume_linear(
    solver: lx.AbstractLinearSolver,
    matvec: Callable[[PyTree], PyTree],
    b: PyTree[Array],
    v0: PyTree[Array] | None,
    preconditioner: Callable[[PyTree], PyTree] | None,
    state: PyTree,
    is_symmetric: bool,
) -> tuple[LinearSolution, PyTree]:
    """`solve_linear` with what the solver learnt from earlier systems, and its next state."""
    if not is_symmetric:
        solver = _for_nonsymmetric(solver)
    if not isinstance(solver, AbstractIterativeLinearSolver):
        return solve_linear(solver, matvec, b, v0, preconditioner, is_symmetric), state
    return solver.resume(matvec, b, v0, preconditioner, state)


def default_linear_solver(is_symmetric: bool, size: int) -> lx.AbstractLinearSolver:
    """`Direct()` for few variables; `CG()` for symmetric systems, otherwise `GMRES()`."""
    if is_symmetric and size <= DIRECT_SIZE:
        return Direct()
    return CG() if is_symmetric else GMRES()


def _for_nonsymmetric(solver: lx.AbstractLinearSolver) -> lx.AbstractLinearSolver:
    if isinstance(solver, Direct):
        return dataclasses.replace(solver, is_symmetric=False)
    needs_symmetric = isinstance(solver, (CG, Recycled, MINRES, Chebyshev, *NEEDS_DEFINITE))
    if needs_symmetric:
        prefix = "lx." if isinstance(solver, NEEDS_DEFINITE) else ""
        kind = "symmetric" if isinstance(solver, MINRES) else "symmetric positive definite"
        raise ValueError(
            f"{prefix}{type(solver).__name__} needs a {kind} system, but the derivative of a "
            "Root or FixedPoint condition is not symmetric. Use GMRES(), lx.BiCGStab(...) or, "
            "with few variables, Direct()."
        )
    if isinstance(solver, (GradientDescent, Neumann)) and solver.step_size is None:
        # The largest eigenvalue says nothing about convergence here; for A = I - T' one does.
        return eqx.tree_at(lambda s: s.step_size, solver, 1.0, is_leaf=lambda x: x is None)
    return solver
