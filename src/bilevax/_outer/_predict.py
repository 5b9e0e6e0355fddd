"""Following a branch of inner solutions: the tangent predicts, the inner solve corrects."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._hypergradient._base import Estimate
from .._hypergradient.implicit._adjoint import with_rtol
from .._linear import solve_linear, verify
from .._problem import AbstractCondition
from .._results import RESULTS
from .._tree import tree_dot, tree_norm, tree_sub, tree_zeros_like
from ._fall_back import is_right

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
    step = tree_sub(theta, anchor.theta)
    moves = tree_dot(step, step) > 0
    tangent = _tangent(condition, linear_solver, anchor.x, anchor.theta, step, None, moves)
    move, is_known, num_products = tangent
    ahead = jtu.tree_map(jnp.add, anchor.x, move)
    return Prediction(ahead, move, is_known, num_products, moves.astype(jnp.int32))


def follow(
    condition: AbstractCondition,
    linear_solver: Any,
    anchor: Anchor,
    prediction: Prediction,
    theta: PyTree,
    estimate: Estimate,
) -> Estimate:
    """`estimate`, flagged where its x is on another branch than the anchor, with the cost.

    With `m` the move of x, and `p` and `q` what the tangents at its two ends say: on a
    smooth branch `||m - p||` and `||m - q||` are `O(||dtheta||^2)`, on another one they do
    not shrink with the step. More than half of the shorter of the two is a jump. (Both
    ends, because at a fold `D x*` grows beyond bounds and passes the value at which `p`
    happens to point at the other branch.) Where the residual at the prediction is as
    small as what the inner solver was asked for, both are solutions, and nothing is said.
    """
    move = tree_sub(estimate.x, anchor.x)
    residual = tree_norm(condition.residual(prediction.x, theta))
    is_visible = prediction.is_known
    if estimate.inner_tolerance is None:  # any x is what was asked for
        is_visible = jnp.zeros_like(is_visible)
    else:
        asked = jnp.maximum(estimate.inner_tolerance, estimate.inner_residual)
        is_visible = is_visible & (residual > _FLOOR * asked)
    step = tree_sub(theta, anchor.theta)
    back, is_known, num_products = _tangent(
        condition, linear_solver, estimate.x, theta, step, prediction.move, is_visible
    )
    jumped = _disagree(move, prediction.move) | (is_known & _disagree(move, back))
    is_jump = jumped & is_visible & is_right(estimate)
    flag = RESULTS.where(is_jump, RESULTS.jumped, RESULTS.successful)
    stats = {
        "num_gradients": 1,
        "num_hessian_products": prediction.num_products + num_products,
        "num_cross_products": prediction.num_cross_products + is_visible.astype(jnp.int32),
    }
    return estimate.also(flag, stats)


def _disagree(move: PyTree, tangent: PyTree) -> Bool[Array, ""]:
    shorter = jnp.minimum(tree_norm(move), tree_norm(tangent))
    return tree_norm(tree_sub(move, tangent)) > _DISAGREEMENT * shorter


def _tangent(
    condition: AbstractCondition,
    linear_solver: Any,
    x: PyTree,
    theta: PyTree,
    step: PyTree,
    guess: PyTree | None,
    is_wanted: Bool[Array, ""],
) -> tuple[PyTree, Bool[Array, ""], Int[Array, ""]]:
    """`D x* step` at `(x, theta)`, whether it was found, and the products it took."""
    if linear_solver is None:
        linear_solver = condition.default_linear_solver(x)
    solver = with_rtol(linear_solver, _RTOL)

    def solve() -> tuple[PyTree, Array, Array]:
        _, b = jax.jvp(lambda t: condition.residual_here(x, t), (theta,), (step,))
        b = jtu.tree_map(jnp.negative, b)
        matvec = condition.linearise(x, theta).forward
        found = solve_linear(solver, matvec, b, guess, is_symmetric=condition.is_symmetric)
        found = verify(found, b, matvec(found.value))
        is_known = found.result == RESULTS.successful
        move = jtu.tree_map(lambda a: jnp.where(is_known, a, 0), found.value)
        return move, is_known, found.num_products

    def stay() -> tuple[PyTree, Array, Array]:
        return tree_zeros_like(x), jnp.array(False), jnp.zeros((), jnp.int32)

    return jax.lax.cond(is_wanted, solve, stay)
