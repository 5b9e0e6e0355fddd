"""What an algorithm of your own derives from: see "Adding an algorithm" in CONTRIBUTING.md.

A condition, an inner solver, a linear solver, a preconditioner, a rule or an outer method that is
defined elsewhere works wherever one of bilevax does, or is refused by name.
"""

from ._hypergradient._at_solution import (
    AbstractAtSolution,
    Adjoint,
    Solved,
)
from ._hypergradient._base import (
    AbstractHypergradient,
    HypergradientState,
    Query,
)
from ._hypergradient._call import Call
from ._hypergradient._point import Point, directions
from ._inner._base import (
    AbstractInnerSolver,
    AbstractSteppingSolver,
    Counts,
    InnerSolution,
    measure,
)
from ._inner._default import as_inner_solver
from ._linear import (
    AbstractIterativeLinearSolver,
    LinearSolution,
)
from ._outer._base import AbstractMethod
from ._outer._evaluation import Evaluation
from ._precondition import AbstractPreconditioner
from ._problem import AbstractCondition
from ._prox import AbstractProx, Piece

__all__ = [
    "AbstractAtSolution",
    "AbstractCondition",
    "AbstractHypergradient",
    "AbstractInnerSolver",
    "AbstractIterativeLinearSolver",
    "AbstractMethod",
    "AbstractPreconditioner",
    "AbstractProx",
    "AbstractSteppingSolver",
    "Adjoint",
    "Call",
    "Counts",
    "Evaluation",
    "HypergradientState",
    "InnerSolution",
    "LinearSolution",
    "Piece",
    "Point",
    "Query",
    "Solved",
    "as_inner_solver",
    "directions",
    "measure",
]
