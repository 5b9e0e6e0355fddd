"""What the double loop does after a flagged evaluation."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._hypergradient._base import Estimate, HypergradientState
from .._results import RESULTS
from .._tree import is_bounded, tree_all_finite, tree_where, tree_zeros_like

MAX_FAILURES = 10
_NUM_RETRIES = 2
_NUM_HALF_STEPS = 3
_LARGEST_ADJOINT_RESIDUAL = 0.1  # relative: nine tenths of the right-hand side are explained


def is_usable(
    estimate: Estimate, num_failures: Int[Array, ""], can_reject: bool
) -> Bool[Array, ""]:
    """Whether theta may move on an evaluation.

    A jump that persists after three half steps is a branch that has ended: the new one is
    accepted, unless a line search can do better. At a kink the value is right, and the
    one-sided derivative a direction to leave it by.
    """
    usable = is_right(estimate) | (estimate.result == RESULTS.at_kink)
    if can_reject:
        return usable
    return usable | ((estimate.result == RESULTS.jumped) & (num_failures >= _NUM_HALF_STEPS))


def is_right(estimate: Estimate) -> Bool[Array, ""]:
    """Whether it is not flagged, or for rounding alone."""
    return (estimate.result == RESULTS.successful) | is_at_floor(estimate)


def is_at_floor(estimate: Estimate) -> Bool[Array, ""]:
    """Whether it is flagged for rounding alone, which does a direction no harm.

    Inner solvers say so below a measured floor. A linear solver says it where its residual
    no longer falls, which may also be far up.
    """
    is_stalled = estimate.result == RESULTS.stalled
    if estimate.adjoint_residual is None:
        return is_stalled
    return is_stalled & ~(estimate.adjoint_residual > _LARGEST_ADJOINT_RESIDUAL)


def is_solved(estimate: Estimate) -> Bool[Array, ""]:
    """Whether its x is a solution of the inner problem, by its tolerance or up to rounding."""
    if estimate.inner_tolerance is None:  # any x is what was asked for
        return jnp.zeros_like(estimate.inner_residual, bool)
    is_small = estimate.inner_residual <= estimate.inner_tolerance
    return is_bounded(estimate.inner_tolerance) & (is_small | is_at_floor(estimate))


def fall_back(
    theta: PyTree,
    good_theta: PyTree,
    num_failures: Int[Array, ""],
    last: HypergradientState,
    estimate: Estimate,
    new: HypergradientState,
    usable: Bool[Array, ""],
) -> tuple[PyTree, HypergradientState, Int[Array, ""], Bool[Array, ""]]:
    """Theta, warm starts, the count of failures, and whether to go back half a step."""
    num_failures = jnp.where(usable, 0, num_failures + 1)
    finite = tree_all_finite((new, estimate.grad))
    is_hopeless = ~finite | (estimate.result == RESULTS.jumped)  # more steps change nothing
    go_back = ~usable & ((num_failures > _NUM_RETRIES) | is_hopeless)
    middle = jtu.tree_map(
        lambda a, b: jnp.where(jnp.isfinite(a), 0.5 * a + 0.5 * b, b), theta, good_theta
    )
    kept = tree_where(finite, new, last)
    if kept.v is not None:
        # Only an unfinished adjoint solve leaves a v worth starting from.
        keep_v = usable | (finite & (estimate.result == RESULTS.adjoint_not_converged))
        v = tree_where(keep_v, kept.v, tree_zeros_like(kept.v))
        kept = eqx.tree_at(lambda s: s.v, kept, v)
    return tree_where(go_back, middle, theta), kept, num_failures, go_back


def same_place(a: PyTree, b: PyTree) -> Bool[Array, ""]:
    """Whether two points are equal entry by entry."""
    equal = [jnp.all(x == y) for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)]
    return jnp.all(jnp.stack(equal)) if equal else jnp.array(True)
