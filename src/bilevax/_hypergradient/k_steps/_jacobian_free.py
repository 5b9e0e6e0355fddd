"""Jacobian-free backpropagation: the identity in place of the inner Jacobian."""

from typing import Any

from jaxtyping import Array, PyTree, Scalar

from ..._checks import check_step_size
from ..._problem import AbstractCondition
from .._at_solution import AbstractAtSolution, Adjoint, Solved
from .._base import HypergradientState, Query
from .._call import Call
from ._series import StepSeries, adjoint_by_series, attach_series, series_of_call


class JacobianFree(AbstractAtSolution):
    """The hypergradient with the inner Jacobian replaced by a multiple of the identity.

        grad = d_theta L - B^T v,    v = step_size d_x L

    For a fixed point `I - T_x` is replaced by `I` (`step_size=1`): JFB. For a minimum the
    Hessian is replaced by `I / step_size`: T1-T2, in whose paper it is 1. It is a property
    of the problem and not of the solver, which `OneStep` asks for its step.

    **Arguments:**

    - `step_size`: by default 1 for a fixed point, and for a minimum one over the largest
        eigenvalue of the Hessian, measured by ten products.

    What is differentiated: theta in the two objectives, or in the map.

    **Returns** (in `estimate`): `adjoint_residual` and `error_estimate` as in `KStep`.
    Where the map does not contract or the step is too large, so that the residual exceeds
    that of `v = 0`, the outcome is `diverged`.

    **Cost:** one cross product, and one more for the error estimate. No memory.

    **Exact when** never. A descent direction if the map contracts fast enough: the relative
    error of `v` is at most `rho`, its contraction factor.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.JacobianFree()
        ```

    Reference: Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", 2022,
    eq. (14); Luketina et al., "Scalable gradient-based tuning of continuous regularization
    hyperparameters", 2016, section 2.2.
    """

    step_size: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_step_size("JacobianFree", self.step_size)

    def adjoint(self, query: Query, solved: Solved, state: HypergradientState) -> Adjoint:
        del state
        return adjoint_by_series(self._series(query.condition), solved.at)

    def attach(
        self, query: Query, x: PyTree, inner_state: PyTree, throw: bool, failed: Any
    ) -> PyTree[Array]:
        del inner_state
        return attach_series(self._series(query.condition), query, x, throw, failed)

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        if call.kind == "root_find":
            _refuse_root()
        return series_of_call(self._of_step(call.kind), call)

    def _series(self, condition: AbstractCondition) -> StepSeries:
        if condition.kind == "root_find":
            _refuse_root()
        return self._of_step(condition.kind)

    def _of_step(self, kind: str) -> StepSeries:
        is_default = self.step_size is None and kind == "fixed_point"
        return StepSeries(1, 1.0 if is_default else self.step_size, is_equation=False)


def _refuse_root() -> None:
    raise TypeError(
        "`JacobianFree` takes the derivative of x - T(x) for the identity, and that of an "
        "equation may be anything, its sign included: state the inner problem as "
        "bx.FixedPoint(step), or use bx.KStep(...) or bx.Implicit(). (optx.fixed_point with a "
        "root finder solves an equation, too: give it optx.FixedPointIteration(...).)"
    )
