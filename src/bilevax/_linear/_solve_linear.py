"""One entry for every linear solver, ours and Lineax'."""

from collections.abc import Callable

import lineax as lx
from jaxtyping import Array, PyTree

from ._base import AbstractIterativeLinearSolver, LinearSolution, refuse_nonsymmetric
from ._cg import CG
from ._direct import Direct
from ._gmres import GMRES
from ._lineax import NEEDS_DEFINITE, solve_by_lineax

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
    if isinstance(solver, AbstractIterativeLinearSolver):
        return solver.for_nonsymmetric()
    if isinstance(solver, NEEDS_DEFINITE):
        refuse_nonsymmetric(f"lx.{type(solver).__name__}", "symmetric positive definite")
    return solver
