"""One-step differentiation: only the last step of the inner algorithm."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._inner._base import AbstractInnerSolver, AbstractSteppingSolver, run
from .._inner._descent import Descent
from .._linear import Neumann
from .._problem import AbstractCondition, Bilevel, Root, start_at
from .._tree import stop_gradient, tree_scale
from ._base import AbstractHypergradient, Estimate, HypergradientState
from ._implicit import Implicit
from ._through_steps import Unrolling, estimate_through


class OneStep(AbstractHypergradient):
    """The derivative of one more step of the inner algorithm, at its result.

    `x` is solved for and taken as a constant, and

        grad of L(T(x, theta), theta),    T one step of the inner algorithm.

    With `Descent`, T is one update of its optimiser in its final state; for a fixed point
    T is its function; for other solvers of a minimum T is a gradient step
    `x - step_size grad_x U(x, theta)`, and then the rule is the one-term Neumann series.

    **Arguments:**

    - `step_size`: of that gradient step; by default the inverse of the largest eigenvalue
        of the Hessian, estimated from a few products. Not used with `Descent`.

    What is differentiated: theta where it enters that step, not `x0`.

    **Cost:** one step forward and back: no Hessian product, one cross product.

    **Exact when** T contracts at once (Newton's method: but then `Implicit` is the same
    thing). In general the relative error is about `rho`, the contraction factor of T: a
    gradient step with condition number 100 has `rho = 0.99`, and the result is then a
    direction rather than a gradient. It is not flagged; the inner residual is reported.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.OneStep()
        ```

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms",
    2023, eq. (3) and corollary 1.
    """

    step_size: float | None = None

    @property
    def differentiates_start(self) -> bool:
        return False

    def init(
        self, problem: Bilevel, inner_solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
    ) -> HypergradientState:
        return self._implicit().init(problem, inner_solver, x0, theta)

    def estimate(
        self,
        problem: Bilevel,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        state: HypergradientState,
    ) -> tuple[Estimate, HypergradientState]:
        if isinstance(inner_solver, Descent):
            estimate, new = estimate_through(_last_step, problem, inner_solver, x0, theta, state)
            return estimate, HypergradientState(x=new.x, v=state.v, inner=new.inner)
        _check_not_root(problem.inner)
        return self._implicit().estimate(problem, inner_solver, x0, theta, state)

    def solution(
        self,
        condition: AbstractCondition,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        throw: bool,
    ) -> PyTree[Array]:
        if isinstance(inner_solver, Descent):
            state = inner_solver.init(condition, start_at(x0, theta), theta)
            return _last_step(condition, inner_solver, x0, theta, state)[0]
        _check_not_root(condition)
        return self._implicit().solution(condition, inner_solver, x0, theta, throw)

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: frozenset[object]
    ) -> PyTree[Array]:
        if rewrite_fn.__module__.endswith("._root_find"):
            _refuse_root()
        if rewrite_fn.__module__.endswith("._fixed_point"):
            # Optimistix' residual is T(x) - x, whose derivative is negative: ours is x - T(x).
            return self._implicit().apply(primal_fn, _Negated(rewrite_fn), inputs, tags)
        return self._implicit().apply(primal_fn, rewrite_fn, inputs, tags)

    def _implicit(self) -> Implicit:
        return Implicit(Neumann(num_terms=1, step_size=self.step_size), inexact=True)


class _Negated:
    """`-fn`, remembering where `fn` came from."""

    def __init__(self, fn: Callable) -> None:
        self.fn = fn
        self.__module__ = fn.__module__

    def __call__(self, *args: PyTree) -> PyTree:
        return tree_scale(-1.0, self.fn(*args))


def _last_step(
    condition: AbstractCondition,
    solver: AbstractSteppingSolver,
    x0: PyTree,
    theta: PyTree,
    state: PyTree,
) -> Unrolling:
    """One more step after the solver's own, the only one that is differentiated."""
    fixed_condition, fixed_theta = stop_gradient((condition, theta))
    x0 = stop_gradient(start_at(x0, theta))
    carry = solver.start(fixed_condition, x0, fixed_theta, stop_gradient(state))
    carry, count = run(solver, fixed_condition, fixed_theta, carry)
    carry = solver.step(condition, theta, stop_gradient(carry))
    x, new_state = solver.finish(condition, carry)
    return x, new_state, count + 1, jnp.asarray(1, jnp.int32)


def _check_not_root(condition: AbstractCondition) -> None:
    if isinstance(condition, Root):
        _refuse_root()


def _refuse_root() -> None:
    raise TypeError(
        "`OneStep` needs one step of an algorithm, and an equation alone does not say which: "
        "use bx.Implicit(), or state the inner problem as bx.FixedPoint(step)."
    )
