"""Following a branch of inner solutions: the tangent predicts, the inner solve corrects."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._hypergradient._adjoint import with_rtol
from .._hypergradient._base import Estimate
from .._linear import default_linear_solver, solve_linear, verify
from .._problem import AbstractCondition
from .._results import RESULTS
from .._tree import tree_dot, tree_norm, tree_size, tree_sub, tree_zeros_like

_RTOL = 1e-2  # of the tangent: the inner solve corrects the rest
_DISAGREEMENT = 0.5
_FLOOR = 3.0  # in units of the inner tolerance: the old x, the new x, and their prediction


class Anchor(eqx.Module):
    """The last solution that is trusted."""

    theta: PyTree[Array]
    x: PyTree[Array]


class Prediction(eqx.Module):
    """Where the branch through the anchor is expected."""

    x: PyTree[Array]
    move: PyTree[Array]  # `x` minus the anchor's
    is_known: Bool[Array, ""]  # the tangent system was solved, and theta has moved
    num_products: Int[Array, ""]
    num_cross_products: Int[Array, ""]


def predict(
    condition: AbstractCondition, linear_solver: Any, anchor: Anchor, theta: PyTree
) -> Prediction:
    """`x + D x* (theta - theta_old)`: one solve `A dx = -B dtheta`, to two digits."""
    x, step = anchor.x, tree_sub(theta, anchor.theta)
    if linear_solver is None:
        linear_solver = default_linear_solver(condition.is_symmetric, tree_size(x))
    solver = with_rtol(linear_solver, _RTOL)

    def solve() -> tuple[PyTree, Array, Array]:
        _, b = jax.jvp(lambda t: condition.residual(x, t), (anchor.theta,), (step,))
        b = jtu.tree_map(jnp.negative, b)
        _, matvec = jax.linearize(lambda x: condition.residual(x, anchor.theta), x)
        found = solve_linear(solver, matvec, b, is_symmetric=condition.is_symmetric)
        found = verify(found, b, matvec(found.value))
        is_known = found.result == RESULTS.successful
        move = jtu.tree_map(lambda a: jnp.where(is_known, a, 0), found.value)
        return move, is_known, found.num_products

    def stay() -> tuple[PyTree, Array, Array]:
        return tree_zeros_like(x), jnp.array(False), jnp.zeros((), jnp.int32)

    moves = tree_dot(step, step) > 0
    move, is_known, num_products = jax.lax.cond(moves, solve, stay)
    ahead = jtu.tree_map(jnp.add, x, move)
    return Prediction(ahead, move, is_known, num_products, moves.astype(jnp.int32))


def has_jumped(
    condition: AbstractCondition,
    anchor: Anchor,
    prediction: Prediction,
    theta: PyTree,
    estimate: Estimate,
) -> Bool[Array, ""]:
    """Whether the new solution belongs to another branch than the anchor.

    With `p` the predicted and `m` the actual move of x: on a smooth branch
    `||m - p|| = O(||dtheta||^2)`, on another one it does not shrink with the step. More
    than half of the shorter of the two is a jump, unless the residual at the prediction
    is as small as what the inner solver was asked for: then both are solutions.
    """
    actual = tree_sub(estimate.x, anchor.x)
    error = tree_norm(tree_sub(estimate.x, prediction.x))
    shorter = jnp.minimum(tree_norm(actual), tree_norm(prediction.move))
    residual = tree_norm(condition.residual(prediction.x, theta))
    asked = jnp.maximum(estimate.inner_tolerance, estimate.inner_residual)
    is_far = (error > _DISAGREEMENT * shorter) & (residual > _FLOOR * asked)
    return prediction.is_known & is_far


def count_prediction(stats: dict[str, Array], prediction: Prediction) -> dict[str, Array]:
    """`stats` with what the prediction and its check cost."""
    return {
        **stats,
        "num_gradients": stats["num_gradients"] + 1,
        "num_hessian_products": stats["num_hessian_products"] + prediction.num_products,
        "num_cross_products": stats["num_cross_products"] + prediction.num_cross_products,
    }
