"""SAMA: the derivative of an adaptive update in place of the inverse Hessian."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from ..._inner._base import AbstractSteppingSolver, Counts
from ..._problem import AbstractCondition, Minimum
from ..._tree import stop_gradient, tree_dot, tree_norm, tree_sub, tree_zeros_like
from .._base import AbstractHypergradient, Estimate, HypergradientState, Query, as_stats
from .._call import Call, algorithm_of
from .._point import point
from ._own_steps import (
    derivative_of,
    run_to_end,
    steps_of_call,
    steps_outcome,
    take_steps,
    what_is_left,
)
from ._series import geometric_remainder


class SAMA(AbstractHypergradient):
    """Scalable meta learning with arbitrary optimisers: `v = D d_x L`.

        grad = d_theta L - B^T v,    v = D^T d_x L,    D = -d update / d gradient

    D is that of the inner optimiser in its final state, at the gradient there, in place of
    the inverse Hessian. For SGD it is the learning rate, for Adam the diagonal

        D = lr ((1 - b1) / c1 / (s + eps) - (1 - b2) / c2 * m g / (s (s + eps)^2))

    with `m` and `s^2` the corrected moments after the gradient `g`, `c1`, `c2` the
    corrections. It is not written down but differentiated, so that every Optax optimiser
    will do.

    This is `OneStep()` with the same `Descent` where theta enters the step through the
    gradient only, except that L is taken at `x` itself and not one step further. Theta in
    the optimiser's own parameters is not differentiated, and `v` is at hand: its residual
    is measured.

    What is differentiated: theta in the two objectives.

    **Returns** (in `estimate`): `adjoint_residual` and `error_estimate` as in `KStep`. An
    adaptive D near convergence is often far too large for a gradient, since it divides by
    small moments: where the residual exceeds that of `v = 0` the outcome is `diverged`, and
    the direction may still be of use (`throw=False`).

    **Cost:** one cross product; one update of the optimiser, back; as much again for the
    error estimate. No finite differences, with which the paper computes `B^T v`.

    **Exact when** never, in general; when `D = A^{-1}`.

    !!! example

        ```python
        import bilevax as bx, optax

        inner_solver = bx.Descent(optax.adam(1e-2), num_steps=500)
        rule = bx.SAMA()
        ```

    Reference: Choe et al., "Making scalable meta learning practical", 2023, section 3.2.
    """

    @property
    def differentiates_start(self) -> bool:
        return False

    def init(self, query: Query) -> HypergradientState:
        _check_optimiser(query.inner_solver)
        x = query.start
        return HypergradientState(x, tree_zeros_like(x), query.inner_state)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        condition, theta = query.condition, query.theta
        _check_optimiser(query.inner_solver)
        # 1. the optimiser's own result
        solver, carry, count = run_to_end(query, state.inner)
        x, inner_state = solver.finish(condition, carry)
        at = point(query.problem, x, theta)
        # 2. the update, differentiated by its gradient
        _, pull = jax.vjp(
            partial(_shifted_step, solver, condition, theta, carry), tree_zeros_like(x)
        )

        def scaled(b: PyTree) -> PyTree:
            return jtu.tree_map(jnp.negative, pull(b)[0])

        v = scaled(at.grad_x)
        grad, product = at.hypergradient(v)
        # 3. what a second step would add
        left = tree_sub(at.grad_x, product)
        next_product, next_cross = at.at.both(scaled(left))
        estimate = Estimate.of(
            at.value,
            grad,
            steps_outcome(left, at.grad_x),
            aux=at.aux,
            x=x,
            v=v,
            inner_residual=tree_norm(at.at.residual),
            stats=as_stats(Counts(count + 2, 2, 2), count, 0),
            adjoint_residual=what_is_left(left, at.grad_x),
            error_estimate=geometric_remainder(next_cross, left, tree_sub(left, next_product)),
            dual_value=at.dual_value(v),
        )
        return estimate, HypergradientState(x, v, inner_state)

    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        condition, theta = query.condition, query.theta
        given = _check_optimiser(query.inner_solver)
        fixed, fixed_theta = stop_gradient((condition, theta))
        state = given.init(fixed, stop_gradient(query.start), fixed_theta)
        solver, carry, _ = run_to_end(query, state)
        gradient = condition.residual(carry[0], theta)
        # zero, with the derivative of the gradient
        shift = derivative_of(gradient, tree_zeros_like(gradient))

        def step(carry: PyTree) -> PyTree:
            return solver.step(_shifted(fixed, shift), fixed_theta, carry)

        fixed_step = partial(solver.step, fixed, fixed_theta)
        moved, *_ = take_steps(step, fixed_step, carry, 1, throw, is_rough=True)
        return derivative_of(moved, carry[0])

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        _check_optimiser(call.solver)
        return steps_of_call(1, call.with_constant_solver(), keep_x=True)


def _shifted_step(
    solver: AbstractSteppingSolver,
    condition: AbstractCondition,
    theta: PyTree,
    carry: PyTree,
    shift: PyTree,
) -> PyTree:
    """`x` after one step with `shift` added to the gradient."""
    return solver.step(_shifted(condition, shift), theta, carry)[0]


def _shifted(condition: AbstractCondition, shift: PyTree) -> Minimum:
    """The objective plus `<shift, x>`: its gradient is shifted."""

    def fn(x: PyTree, theta: PyTree, *data: PyTree) -> Array:
        batch = dataclasses.replace(condition, data=data[0]) if data else condition
        return batch.objective(x, theta) + tree_dot(shift, x)  # type: ignore[misc]

    return Minimum(fn, condition.data)


def _check_optimiser(solver: Any) -> Any:
    """Raise unless each step is an update of an Optax optimiser."""
    bare = algorithm_of(solver)
    if not getattr(bare, "steps_by_gradient", isinstance(bare, optx.OptaxMinimiser)):
        raise TypeError(
            "`SAMA` differentiates the update of an Optax optimiser, and "
            f"{type(bare).__name__} has none: use bx.Descent(optimizer, num_steps=...) or "
            "optx.OptaxMinimiser(...) as inner solver, or the rule bx.OneStep() or bx.Implicit()."
        )
    return solver
