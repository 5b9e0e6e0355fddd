"""Linear systems given by products."""

from ._base import (
    AbstractDirectLinearSolver as AbstractDirectLinearSolver,
    AbstractIterativeLinearSolver as AbstractIterativeLinearSolver,
    LinearSolution as LinearSolution,
    verify as verify,
)
from ._cg import CG as CG
from ._chebyshev import Chebyshev as Chebyshev
from ._direct import Direct as Direct
from ._gmres import GMRES as GMRES
from ._gradient_descent import GradientDescent as GradientDescent
from ._lu import LU as LU
from ._minres import MINRES as MINRES
from ._neumann import Neumann as Neumann
from ._recycled import Recycled as Recycled
from ._solve_linear import (
    DIRECT_SIZE as DIRECT_SIZE,
    default_linear_solver as default_linear_solver,
    resume_linear as resume_linear,
    solve_linear as solve_linear,
)
