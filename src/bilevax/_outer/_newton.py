"""Newton's method for the outer level, with the exact hyper-Hessian."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_count
from .._hypergradient._base import Estimate
from .._linear._in_turn import factorise
from .._tree import (
    dense_columns,
    flat_to_tree,
    tree_size,
    tree_to_flat,
    tree_where,
)
from ._line_search import (
    Search,
    check_step,
    first_search,
    is_finished,
    limited,
    next_search,
)
from ._update import AbstractOuterOptimizer, Update


class OuterNewton(AbstractOuterOptimizer):
    """Newton's method on theta, for few outer variables and an implicit rule.

    `theta <- theta - t |H|^{-1} h`, with `h` the hypergradient and `H` the second
    derivative of `L(x*(theta), theta)`, by forward-mode differentiation of the implicit
    derivative; `|H|` has the magnitudes of its eigenvalues, so that saddle points and
    maxima are left. `t <= 1` from the line search of `OuterLBFGS`; no entry of theta moves
    by more than `max_step` at once (see there).

    **Arguments:**

    - `max_step`: the longest step of an entry of theta.
    - `max_variables`: more entries of theta are refused.

    `history.predicted_decrease` is the Newton decrement `h'|H|^{-1} h / 2`, what the quadratic
    model predicts for the next whole step, not the distance to the optimum. On a long flat
    tail it stays large where `h` does not. The run stops by itself ("optimizer") when it is
    below rounding, or when the line search finds nothing better.

    **Cost:** one evaluation a step, a rejected trial included; for each accepted theta as
    many pairs of adjoint solves as theta has entries, in one batch, not counted in
    `history`.

    **Exact when** the inner problem is solved exactly; quadratic convergence near a strict
    minimum.

    !!! example

        ```python
        import bilevax as bx

        method = bx.DoubleLoop(optimizer=bx.OuterNewton())
        ```

    Reference: Dauphin et al., "Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization", 2014, section 4 (`|H|`).
    """

    needs_implicit: ClassVar[bool] = True

    max_step: float | Scalar = 1.0
    max_variables: int = 64

    def __check_init__(self) -> None:
        check_step("OuterNewton", self.max_step)
        check_count("OuterNewton", max_variables=self.max_variables)

    @property
    def can_reject(self) -> bool:
        return True

    def init(self, theta: PyTree) -> Search:
        if tree_size(theta) > self.max_variables:
            raise TypeError(
                f"OuterNewton forms the second derivative in theta, which has {tree_size(theta)} "
                f"entries; max_variables is {self.max_variables}. Use bx.OuterLBFGS(), or raise "
                "max_variables if you can afford as many adjoint solves a step."
            )
        return first_search(theta)

    def next_point(self, theta: PyTree, state: Search) -> PyTree:
        del theta
        return state.point

    def update(
        self,
        theta: PyTree,
        state: Search,
        estimate: Estimate,
        value_fn: Callable[[PyTree], Scalar],
    ) -> Update:
        search, point = state, state.point
        accept = search.accepts(estimate)

        def newton() -> tuple[PyTree, Scalar]:
            hessian = dense_columns(lambda u: jax.jvp(jax.grad(value_fn), (point,), (u,))[1], point)
            flat, promised = _newton_step(hessian, tree_to_flat(estimate.grad))
            step = limited(flat_to_tree(flat, point), estimate.grad, self.max_step)
            return step, promised.astype(search.predicted_decrease.dtype)

        def nothing() -> tuple[PyTree, Scalar]:
            return jax.tree_util.tree_map(jnp.zeros_like, point), search.predicted_decrease

        step, predicted_decrease = jax.lax.cond(accept, newton, nothing)
        onward = next_search(estimate, point, step, predicted_decrease, search)
        shorter = search.shortened(theta, estimate)
        new_state = tree_where(accept, onward, shorter)
        done = accept & is_finished(estimate, predicted_decrease)
        done = done | (~accept & shorter.is_lost & ~search.is_first)
        return Update(tree_where(accept, point, theta), new_state, done, predicted_decrease)


def _newton_step(
    hessian: Float[Array, "p p"], gradient: Float[Array, " p"]
) -> tuple[Float[Array, " p"], Scalar]:
    """`-|H|^{-1} h` and `h'|H|^{-1} h / 2`; NaN where the Hessian is not finite."""
    values, vectors = factorise(jnp.linalg.eigh, (hessian + hessian.T) / 2)
    values = jnp.abs(values)
    # Below this an eigenvalue is the rounding error, or the inexactness, of the others.
    floor = jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.max(values)
    values = jnp.maximum(values, floor)
    along = gradient @ vectors
    scaled = jnp.where(along == 0, 0, along / jnp.where(values > 0, values, 1))
    scaled = jnp.where(jnp.isfinite(values), scaled, jnp.nan)
    return -(vectors @ scaled), 0.5 * jnp.sum(along * scaled)
