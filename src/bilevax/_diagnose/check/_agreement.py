"""The hypergradient against central differences of the outer objective at the solution."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..._hypergradient._base import Estimate
from ..._problem import Bilevel
from ..._tree import tree_all_finite, tree_axpy, tree_dot, tree_norm, tree_sub
from ..measure._differences import precision, random_direction, relative, slope, unit
from ..measure._measurements import Solved, solve_again
from ._record import DirectionalDerivative


class Agreement(NamedTuple):
    """The comparisons, and what the inner solves on the way had to say."""

    comparisons: tuple[DirectionalDerivative, ...]
    resolved_residual: float
    jumps: bool
    has_kink: bool


class _Along(NamedTuple):
    comparison: DirectionalDerivative
    resolved_residual: float
    jumps: bool
    has_kink: bool


def compare_directions(
    problem: Bilevel, solver: Any, start: PyTree, theta: PyTree, estimate: Estimate, num: int
) -> Agreement:
    """Compare along `num` pseudo-random directions and along the hypergradient itself.

    The inner problem is solved from `start` at every point.
    """
    base = solve_again(problem, solver, start, theta)
    if not tree_all_finite((base.value, base.residual, base.x, estimate.grad, estimate.v)):
        return Agreement((), relative(base.residual, base.scale), False, False)
    # An inner residual r moves the outer objective by v'r (v is its adjoint variable).
    noise = 0.0
    if estimate.v is not None:
        noise = float(tree_norm(estimate.v)) * float(base.residual)
    rows = [
        _compare(problem, solver, start, theta, estimate, base, noise, name, direction)
        for name, direction in _directions(theta, estimate.grad, num)
    ]
    return Agreement(
        comparisons=tuple(row.comparison for row in rows),
        resolved_residual=max(
            [row.resolved_residual for row in rows], default=relative(base.residual, base.scale)
        ),
        jumps=any(row.jumps for row in rows),
        has_kink=any(row.has_kink for row in rows),
    )


def _directions(theta: PyTree, grad: PyTree, num: int) -> list[tuple[str, PyTree]]:
    """Directions along which one unit is a change of order one in theta."""
    found = [(f"random {k + 1}", random_direction(theta, k)) for k in range(num)]
    scaled = jtu.tree_map(lambda h, t: h * unit(t), grad, theta)
    largest = max(
        (float(jnp.max(jnp.abs(leaf), initial=0)) for leaf in jtu.tree_leaves(scaled)), default=0.0
    )
    if 0 < largest < np.inf:
        along = jtu.tree_map(lambda h, t: h * (unit(t) / largest), scaled, theta)
        found.append(("hypergradient", along))
    return found


def _compare(
    problem: Bilevel,
    solver: Any,
    start: PyTree,
    theta: PyTree,
    estimate: Estimate,
    base: Solved,
    noise: float,
    name: str,
    direction: PyTree,
) -> _Along:
    moves: dict[float, float] = {}
    residuals = [relative(base.residual, base.scale)]

    def along(t: float) -> float:
        solved = solve_again(problem, solver, start, tree_axpy(t, direction, theta))
        moves[t] = float(tree_norm(tree_sub(solved.x, base.x)))
        residuals.append(relative(solved.residual, solved.scale))
        return float(solved.value)

    eps = precision(base.value, theta)
    predicted = float(tree_dot(estimate.grad, direction))
    # What a derivative along a direction of this length usually is.
    scaled = jtu.tree_map(lambda h, t: h * unit(t), estimate.grad, theta)
    usual = float(tree_norm(scaled))
    found = slope(along, float(base.value), eps, noise, usual)
    size = max(abs(predicted), abs(found.value), usual)
    gap = abs(predicted - found.value)
    # Three digits, two below float64: what the default tolerances of a rule promise.
    allowed = (1e-3 if eps < 1e-12 else 1e-2) * size + 3 * found.uncertainty
    # Where x*(theta) is continuous it moves by a quarter with a quarter of the step.
    small, large = (max(moves[s], moves[-s]) for s in (found.step, found.previous_step))
    threshold = 1e-2 * float(tree_norm(base.x)) + 1e-6
    return _Along(
        DirectionalDerivative(
            direction=name,
            hypergradient=predicted,
            difference=found.value,
            uncertainty=found.uncertainty,
            gap=relative(gap, size),
            agrees=bool(gap <= allowed),
        ),
        resolved_residual=max(residuals),
        jumps=bool(small > threshold and small > 0.5 * large),
        has_kink=found.is_kink(size),
    )
