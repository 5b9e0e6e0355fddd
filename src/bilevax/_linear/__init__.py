"""Linear systems given by products."""

from ._base import (
    AbstractIterativeLinearSolver as AbstractIterativeLinearSolver,
    LinearSolution as LinearSolution,
    verify as verify,
)
from ._cg import CG as CG
from ._gradient_descent import GradientDescent as GradientDescent
from ._lineax import (
    default_linear_solver as default_linear_solver,
    solve_linear as solve_linear,
)
from ._neumann import Neumann as Neumann
