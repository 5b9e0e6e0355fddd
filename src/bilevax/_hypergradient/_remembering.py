"""Solvers whose steps depend on the steps before: their derivative need not converge with x."""

import warnings
from typing import Any

import jax
import optimistix as optx
from jaxtyping import PyTree

from .._inner._descent import Descent, is_quasi_newton
from .._inner._lbfgs import LBFGS

_REMEMBERING = (optx.AbstractQuasiNewton, optx.NonlinearCG, LBFGS)


def warn_of_memory(rule: Any, solver: Any, x0: PyTree) -> None:
    """Say so where the steps of `solver` are differentiated and nothing can be measured.

    An estimate is compared with the equation of the solution; a derivative inside another
    program is not.
    """
    while hasattr(solver, "solver"):  # of adapters
        solver = solver.solver
    if isinstance(solver, Descent):
        remembers = hasattr(solver.optimizer, "init") and is_quasi_newton(
            jax.eval_shape(solver.optimizer.init, x0)
        )
    elif isinstance(solver, optx.OptaxMinimiser):
        remembers = is_quasi_newton(jax.eval_shape(solver.optim.init, x0))
    else:
        remembers = isinstance(solver, _REMEMBERING)
    if remembers:
        warnings.warn(
            f"bx.{type(rule).__name__} differentiates the steps of {type(solver).__name__}, "
            "which build on each other: where x has converged their derivative may be wrong by "
            "orders of magnitude, and here nothing tells. bx.hypergradient compares it with the "
            "equation of the solution (outcome path_dependent). Use bx.Implicit(), or "
            "bx.KStep(...) with plain steps.",
            UserWarning,
            stacklevel=2,
        )
