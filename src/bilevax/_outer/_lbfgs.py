"""L-BFGS for the outer level: inexact hypergradients, limited steps."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._checks import check_count
from .._hypergradient._base import Estimate
from .._inner._lbfgs_history import History, empty_history
from .._tree import tree_dot, tree_norm, tree_sub, tree_where
from ._line_search import (
    Search,
    check_step,
    first_search,
    gradient_noise,
    is_finished,
    limited,
    next_search,
    rescaled,
)
from ._update import AbstractOuterOptimizer, Update


class OuterLBFGS(AbstractOuterOptimizer):
    """L-BFGS on theta, for hypergradients that are not exact.

    `theta <- theta - t H h`, with `h` the hypergradient, `H` the inverse Hessian that the
    last pairs `s` (steps) and `y` (changes of `h`) suggest, `t <= 1` from a line search
    on the dual value `L - v' grad_x U`, which is accurate to second order in the error of
    x. What an error of the hypergradient could have caused is not believed:

    - a decrease is asked for only up to the noise of the two values;
    - a pair is left out if `y's < 2 E ||s||`, `E` the error of a hypergradient
        (`error_estimate` where the rule gives one, else from the adjoint residual).

    No entry of theta moves by more than `max_step` at once, in the units of theta, which
    should be logarithms of strengths (a factor of e, then): their optima often lie at
    infinity, where a first long step lands on a flat tail and everything looks converged.
    Where the value curves down, the step is as long as `max_step` allows.

    **Arguments:**

    - `max_step`: the longest step of an entry of theta.
    - `memory`: how many pairs are kept.

    `history.predicted_decrease` is `h'H h / 2`, what the model predicts for the next whole
    step, not the distance to the optimum. The run stops by itself ("optimizer") when no next
    step is predicted to change the value by more than rounding, or when the line search
    finds nothing better along the steepest descent.

    **Cost:** one evaluation a step, a rejected trial included; `2 memory` vectors like
    theta.

    !!! example

        ```python
        import bilevax as bx

        method = bx.DoubleLoop(
            hypergradient=bx.Implicit(error_estimate=True), optimizer=bx.OuterLBFGS()
        )
        ```

    Reference: Xie, Byrd and Nocedal, "Analysis of the BFGS method with errors", SIAM J.
    Optim. 30 (2020), sections 1 and 5 (noise in values and in pairs).
    """

    max_step: float | Scalar = 1.0
    memory: int = 10

    def __check_init__(self) -> None:
        check_step("OuterLBFGS", self.max_step)
        check_count("OuterLBFGS", memory=self.memory)

    @property
    def can_reject(self) -> bool:
        return True

    def init(self, theta: PyTree) -> "_State":
        pairs, zero = empty_history(theta, self.memory), jnp.zeros((), tree_norm(theta).dtype)
        return _State(first_search(theta), pairs, jnp.array(True), zero)

    def next_point(self, theta: PyTree, state: "_State") -> PyTree:
        del theta
        return state.search.point

    def update(
        self, theta: PyTree, state: "_State", estimate: Estimate, value_fn: Callable
    ) -> Update:
        del value_fn
        search, point = state.search, state.search.point
        accept = search.accepts(estimate)
        # 1. accepted: a pair, and the next direction
        step, change = tree_sub(point, theta), tree_sub(estimate.grad, search.grad)
        noise = gradient_noise(estimate)
        doubt = (state.gradient_noise + noise) * tree_norm(step)
        curvature = tree_dot(step, change)
        is_pair = accept & ~search.is_first & (curvature > doubt)
        pairs = state.pairs.add(step, change, is_pair)
        is_empty = state.is_empty & ~is_pair
        direction = pairs.direction(estimate.grad)
        # Without a scale, or where the value curves down, as far as allowed.
        is_long = is_empty | (curvature < -doubt)
        long = rescaled(direction, self.max_step, only_shorten=False)
        direction = tree_where(is_long, long, direction)
        predicted_decrease = -0.5 * tree_dot(estimate.grad, direction)
        ahead = limited(direction, estimate.grad, self.max_step)
        onward = next_search(estimate, point, ahead, predicted_decrease, search)
        # 2. rejected: a shorter step; if that does not help, the steepest descent
        shorter = search.shortened(theta, estimate)
        is_lost, was_steepest = shorter.is_lost, state.is_empty
        shorter = tree_where(is_lost, search.restarted(theta, self.max_step), shorter)
        is_empty = jnp.where(accept, is_empty, state.is_empty | is_lost)
        fresh = empty_history(theta, self.memory)
        new_state = _State(
            tree_where(accept, onward, shorter),
            tree_where(~accept & is_lost, fresh, pairs),
            is_empty,
            jnp.where(accept, noise, state.gradient_noise),
        )
        done = accept & is_finished(estimate, predicted_decrease)
        done = done | (~accept & is_lost & was_steepest)
        predicted_decrease = jnp.where(accept, predicted_decrease, search.predicted_decrease)
        return Update(tree_where(accept, point, theta), new_state, done, predicted_decrease)


class _State(eqx.Module):
    search: Search
    pairs: History
    is_empty: Array  # no pair yet
    gradient_noise: Scalar  # at the accepted theta
