"""bilevax: bilevel optimization in JAX.

`theta* = argmin L(x*(theta), theta)` where `x*(theta) = argmin_x U(x, theta)`. Names below
stand in the order of the data: problem, inner, hypergradient, outer, diagnosis, solve, report.
Linear solvers are in `bilevax.linear`, preconditioners in `bilevax.precondition`.
"""

from warnings import warn as _warn

from ._problem import (
    Bilevel as Bilevel,
    FixedPoint as FixedPoint,
    LeastSquares as LeastSquares,
    Minimum as Minimum,
    ConstrainedMinimum as ConstrainedMinimum,
    PrimalDual as PrimalDual,
    QP as QP,
    ProximalMinimum as ProximalMinimum,
    Root as Root,
)
from ._inner._newton_cg import NewtonCG as NewtonCG
from ._inner._lbfgs import LBFGS as LBFGS
from ._inner._descent import Descent as Descent
from ._inner._proximal_gradient import ProximalGradient as ProximalGradient
from ._inner._coordinate_descent import CoordinateDescent as CoordinateDescent
from ._inner._proximal_newton import ProximalNewton as ProximalNewton
from ._inner._interior_point import InteriorPoint as InteriorPoint
from ._inner._quadratic import (
    OSQP as OSQP,
    Clarabel as Clarabel,
    QPax as QPax,
)
from ._inner._batches import Minibatches as Minibatches
from ._inner._optimistix import Optimistix as Optimistix
from ._inner._external import External as External, Given as Given, Traceable as Traceable
from ._hypergradient.implicit._implicit import Implicit as Implicit
from ._hypergradient.implicit._polished import Polished as Polished
from ._hypergradient.implicit._accurate import Accurate as Accurate
from ._hypergradient.implicit._minimum_norm import MinimumNorm as MinimumNorm
from ._loop._budget import MemoryBudget as MemoryBudget
from ._hypergradient.unrolled._unrolled import Unrolled as Unrolled
from ._hypergradient.unrolled._truncated import Truncated as Truncated
from ._hypergradient.unrolled._forward_mode import ForwardMode as ForwardMode
from ._hypergradient.k_steps._one_step import OneStep as OneStep
from ._hypergradient.k_steps._k_step import KStep as KStep
from ._hypergradient.k_steps._sama import SAMA as SAMA
from ._hypergradient.k_steps._jacobian_free import JacobianFree as JacobianFree
from ._hypergradient.evolution._evolution import EvolutionStrategies as EvolutionStrategies
from ._hypergradient.evolution._persistent import PersistentES as PersistentES
from ._hypergradient._base import Estimate as Estimate
from ._hypergradient._entry import argmin as argmin, hypergradient as hypergradient
from ._hypergradient._several import hypergradients as hypergradients
from ._hypergradient._jacobian import jacobian as jacobian
from ._outer._double_loop import DoubleLoop as DoubleLoop
from ._outer._maid import MAID as MAID
from ._outer._single_loop import SingleLoop as SingleLoop
from ._outer._lbfgs import OuterLBFGS as OuterLBFGS
from ._outer._newton import OuterNewton as OuterNewton
from ._outer._tolerances import (
    ExponentialTolerance as ExponentialTolerance,
    PolynomialTolerance as PolynomialTolerance,
)
from ._diagnose.check._check import check as check
from ._diagnose.compare._compare import compare as compare
from ._diagnose.recommend._recommend import recommend as recommend
from ._solve import solve as solve
from ._report._progress import Progress as Progress
from ._report._history import History as History
from ._report._solution import Solution as Solution
from ._results import RESULTS as RESULTS, SolveError as SolveError

from . import linear as linear, precondition as precondition, prox as prox, records as records
from ._habits import explain_keywords as _explain_keywords, explain_name as _explain_name

_explain_keywords(globals(), "bx.")
_explain_keywords(vars(linear), "bx.linear.")
_explain_keywords(vars(precondition), "bx.precondition.")
_explain_keywords(vars(prox), "bx.prox.")


def __getattr__(name: str) -> object:
    homes = {"linear": linear, "precondition": precondition, "prox": prox, "records": records}
    for home, module in homes.items():
        if name in vars(module) and not name.startswith("_"):
            _warn(f"bx.{name} is bx.{home}.{name}.", DeprecationWarning, stacklevel=2)
            return getattr(module, name)
    raise AttributeError(
        _explain_name(name, globals(), {home: vars(module) for home, module in homes.items()})
    )
