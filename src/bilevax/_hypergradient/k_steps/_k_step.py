"""K-step differentiation: only K more steps of the inner algorithm."""

from typing import Any

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar

from ..._checks import check_positive, check_step_size
from .._at_solution import AbstractAtSolution, Adjoint, Solved
from .._base import Estimate, HypergradientState, Query
from .._call import Call, algorithm_of
from ._own_steps import (
    estimate_by_steps,
    has_own_steps,
    solution_by_steps,
    steps_of_call,
)
from ._series import StepSeries, adjoint_by_series, attach_series, series_of_call


class KStep(AbstractAtSolution):
    """The derivative of K more steps of the inner algorithm, after its result.

    `x` is solved for and taken as a constant, and

        grad of L(T_K(x, theta), theta),    T_K = T o ... o T, K steps of the inner algorithm.

    What a step is:

    - `Descent`, `optx.OptaxMinimiser`: one more update of the optimiser in its final state.
    - `optx.Newton`, `optx.Chord`: one more of their steps. That of Newton contracts at
        once: the answer is the implicit one, for K = 1 already.
    - another solver of a `FixedPoint`: its map, damped as in `optx.FixedPointIteration`.
    - another solver of a minimum: `x - s grad_x U(x, theta)`, with the learning rate s of
        `optx.GradientDescent`, else s one over the largest eigenvalue of the Hessian, from
        ten products. This is the Neumann series of K terms.
    - another solver of a `Root`: `x - s F_x^T F(x, theta)` with s one over the square of
        the largest singular value of `F_x`, measured, too. It contracts whenever `F_x` is
        invertible, and is the Neumann series of the normal equations, whose condition is
        squared: the error falls as `(1 - 1/kappa^2)^K`.

    **Arguments:**

    - `num_steps`: K.
    - `step_size`: take steps of the last two kinds, or of a map damped by it, with this s,
        instead of the solver's own.

    What is differentiated: theta where it enters these steps, not `x0`.

    **Returns** (in `estimate`): `adjoint_residual`, the part of `d_x L` that is left after
    going back K steps, and `error_estimate`, the sum of the terms left out if they go on
    falling as the first of them does. It is too small where slow modes have not emerged
    from the fast ones yet. If the terms grow, the outcome is `diverged`: K steps of an
    algorithm that does not contract say nothing. `bx.argmin` and Optimistix' `adjoint=`
    have no estimate: a `UserWarning` tells where more than a tenth of `d_x L` is left.

    **Cost:** K steps forward and back, or K - 1 Hessian products and one cross product
    (an equation: twice that); one more for the error estimate, and ten Hessian products
    for s. Memory of `4 sqrt(K)` carries, or of a few vectors like `x`.

    **Exact when** T contracts at once; the relative error falls as `rho^K`, rho the
    contraction factor of T, `1 - 1/kappa` for gradient steps with condition number kappa.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.KStep(num_steps=20)
        ```

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms",
    2023, section 2.3; for the series, Lorraine, Vicol, Duvenaud, "Optimizing millions of
    hyperparameters by implicit differentiation", 2020, eq. (8).
    """

    num_steps: int
    step_size: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_positive(self.num_steps, "num_steps")
        check_step_size(type(self).__name__, self.step_size)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        if self._takes_own_steps(query.inner_solver):
            return estimate_by_steps(self.num_steps, query, state)
        return super().estimate(query, state)

    def adjoint(self, query: Query, solved: Solved, state: HypergradientState) -> Adjoint:
        del state
        return adjoint_by_series(self._series_of(query), solved.at)

    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        if self._takes_own_steps(query.inner_solver):
            return solution_by_steps(self.num_steps, query, throw)
        return super().solution(query, throw)

    def attach(
        self, query: Query, x: PyTree, inner_state: PyTree, throw: bool, failed: Any
    ) -> PyTree[Array]:
        del inner_state
        return attach_series(self._series_of(query), query, x, throw, failed)

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        if self._takes_own_steps(call.solver):
            return steps_of_call(self.num_steps, call)
        return series_of_call(self._series(call.kind, call.solver), call)

    def _takes_own_steps(self, solver: Any) -> bool:
        return self.step_size is None and has_own_steps(solver)

    def _series_of(self, query: Query) -> StepSeries:
        return self._series(query.condition.kind, query.inner_solver)

    def _series(self, kind: str, solver: Any) -> StepSeries:
        solver = algorithm_of(solver)
        step_size = self.step_size
        if step_size is None and kind == "fixed_point":
            is_damped = isinstance(solver, optx.FixedPointIteration)
            step_size = 1 - solver.damp if is_damped else 1.0
        elif step_size is None and kind != "root_find" and isinstance(solver, optx.GradientDescent):
            step_size = jnp.asarray(solver.search.learning_rate)
        return StepSeries(self.num_steps, step_size, kind == "root_find")
