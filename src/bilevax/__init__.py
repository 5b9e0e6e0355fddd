"""bilevax: bilevel optimization in JAX.

`theta* = argmin L(x*(theta), theta)` where `x*(theta) = argmin_x U(x, theta)`. Names below
stand in the order of the data: problem, inner, linear, hypergradient, outer, solve, report.
"""

from ._problem import (
    Bilevel as Bilevel,
    FixedPoint as FixedPoint,
    LeastSquares as LeastSquares,
    Minimum as Minimum,
    Root as Root,
)
from ._inner._newton_cg import NewtonCG as NewtonCG
from ._inner._lbfgs import LBFGS as LBFGS
from ._inner._descent import Descent as Descent
from ._inner._batches import Minibatches as Minibatches
from ._inner._optimistix import Optimistix as Optimistix
from ._inner._external import External as External, Given as Given, Traceable as Traceable
from ._linear import (
    CG as CG,
    MINRES as MINRES,
    Direct as Direct,
    GMRES as GMRES,
    Chebyshev as Chebyshev,
    GradientDescent as GradientDescent,
    Neumann as Neumann,
    Recycled as Recycled,
)
from ._precondition import (
    AdamState as AdamState,
    Jacobi as Jacobi,
    Nystrom as Nystrom,
    QuasiNewton as QuasiNewton,
)
from ._hypergradient.implicit._implicit import Implicit as Implicit
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
from ._hypergradient._jacobian import Jacobian as Jacobian, jacobian as jacobian
from ._outer._double_loop import DoubleLoop as DoubleLoop
from ._outer._maid import MAID as MAID
from ._outer._single_loop import SingleLoop as SingleLoop
from ._outer._lbfgs import OuterLBFGS as OuterLBFGS
from ._outer._newton import OuterNewton as OuterNewton
from ._outer._tolerances import (
    ExponentialTolerance as ExponentialTolerance,
    PolynomialTolerance as PolynomialTolerance,
)
from ._diagnose.check._record import Check as Check, Comparison as Comparison
from ._diagnose.check._check import check as check
from ._diagnose.compare._record import (
    ErrorCurve as ErrorCurve,
    MeasuredRule as MeasuredRule,
    RuleComparison as RuleComparison,
)
from ._diagnose.compare._compare import compare as compare
from ._diagnose.recommend._record import Recommendation as Recommendation
from ._diagnose.recommend._recommend import recommend as recommend
from ._solve import solve as solve
from ._report._progress import Progress as Progress
from ._report._history import History as History
from ._report._solution import Solution as Solution
from ._results import RESULTS as RESULTS, SolveError as SolveError

from ._habits import explain_keywords as _explain_keywords, explain_name as _explain_name

_explain_keywords(globals(), __name__)


def __getattr__(name: str) -> object:
    raise AttributeError(
        _explain_name(name, [public for public in globals() if not public.startswith("_")])
    )
