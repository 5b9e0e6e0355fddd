"""One look after another at a problem and a point, put together as a `Check`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._hypergradient._base import AbstractHypergradient, Estimate
from ..._hypergradient._entry import hypergradient
from ..._inner._external import Given
from ..._problem import Bilevel
from ..._tree import default_rtol, tree_dtype, tree_norm, tree_size, tree_sub, tree_zeros_like
from ..measure._differences import gaussian, relative
from ..measure._measurements import AtPoint, Solved, at_point, constants, newton_step, solve_again
from ..measure._self_check import self_check
from ..measure._spectrum import Spectrum, spectrum
from ._agreement import compare_directions
from ._record import Check


def assemble(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    solver: Any,
    rule: AbstractHypergradient,
    num_directions: int,
    max_lanczos_steps: int,
) -> Check:
    """Everything that `check` reports but the reason."""
    # 1. the hypergradient, at the polished x
    polished = solve_again(problem, solver, x, theta)
    here = at_point(problem, x, polished.x, theta)
    ends = spectrum(problem, x, theta, max_lanczos_steps)
    is_implicit = rule.is_implicit
    if is_implicit:
        start = polished.x
        estimate = _estimate(problem, start, theta, Given(), rule)
        at_x = _estimate(problem, x, theta, Given(), rule)
    else:  # the rule's objective begins at x, and knows no polished one
        start = x
        estimate = at_x = _estimate(problem, x, theta, solver, rule)
    # 2. the differences
    kink, wrong = self_check(problem, x, theta, here)
    agreement = compare_directions(problem, solver, start, theta, estimate, num_directions)
    # An inner solver that stops early makes noise, which is no kink.
    is_resolved = agreement.resolved_residual <= default_rtol(x) or not is_implicit
    if agreement.has_kink and is_resolved and not (kink or wrong or agreement.jumps):
        kink = "outer objective at the inner solution, along theta"
    # 3. the constants
    v = tree_zeros_like(x) if estimate.v is None else estimate.v
    starts = gaussian(x, 4), gaussian(theta, 5)
    cross, smoothness = constants(problem, polished.x, theta, v, *starts)
    evidence = [tree_norm(estimate.grad), ends.largest, polished.value, polished.residual]
    return Check(
        rule=type(rule).__name__,
        is_implicit=is_implicit,
        **_of_point(problem, x, theta, here),
        **_of_spectrum(ends, float(jnp.finfo(tree_dtype(x)).eps)),
        distance=newton_step(problem, x, theta, here.residual, ends.matrix),
        cross_norm=_unless_rounding(float(cross), here, polished),
        adjoint_smoothness=float(smoothness),
        **_of_estimate(estimate, at_x),
        comparisons=agreement.comparisons,
        disagreement=max((row.gap for row in agreement.comparisons), default=0.0),
        moved=float(polished.moved),
        resolved_residual=agreement.resolved_residual,
        kink=kink,
        wrong_derivative=wrong,
        jumps=agreement.jumps,
        is_finite=bool(here.is_finite) and all(np.isfinite(float(a)) for a in evidence),
    )


def _estimate(
    problem: Bilevel, x: PyTree, theta: PyTree, solver: Any, rule: AbstractHypergradient
) -> Estimate:
    return hypergradient(problem, x, theta, inner_solver=solver, rule=rule, throw=False)[0]


def _of_point(problem: Bilevel, x: PyTree, theta: PyTree, here: AtPoint) -> dict[str, Any]:
    rtol = default_rtol(x)
    return {
        "kind": type(problem.inner).__name__,
        "dtype": str(tree_dtype(x)),
        "size_x": tree_size(x),
        "size_theta": tree_size(theta),
        "inner_residual": float(here.residual_norm),
        "inner_scale": float(here.scale),
        "inner_tolerance": rtol * float(here.scale),
        "rtol": rtol,
        "x_norm": float(here.x_norm),
        "direct_norm": float(here.direct_norm),
    }


def _of_estimate(estimate: Estimate, at_x: Estimate) -> dict[str, Any]:
    norm = float(tree_norm(estimate.grad))
    residual = estimate.adjoint_residual
    return {
        "value": float(estimate.value),
        "hypergradient_norm": norm,
        "adjoint_residual": None if residual is None else float(residual),
        "outcome": estimate.result.name,
        "error_at_x": relative(tree_norm(tree_sub(at_x.grad, estimate.grad)), norm),
    }


def _of_spectrum(ends: Spectrum, eps: float) -> dict[str, Any]:
    lipschitz = max(abs(ends.smallest), abs(ends.largest)) + ends.largest_uncertainty
    return {
        "curvature": ends.verdict,
        **{key: value for key, value in ends._asdict().items() if key not in {"verdict", "matrix"}},
        "eps": eps,
        "attainable": ends.condition * eps,
        "lipschitz": lipschitz,
        "step_size": 1 / lipschitz if lipschitz > 0 else float("nan"),
    }


def _unless_rounding(cross_norm: float, here: AtPoint, polished: Solved) -> float:
    """`||B||`, or zero where theta moves the inner residual by no more than its rounding."""
    eps = float(jnp.finfo(here.scale.dtype).eps)
    # Where theta only scales the inner objective, B falls to zero with the residual.
    rounding = 3 * float(polished.residual) + 10 * eps * float(polished.scale)
    return cross_norm if cross_norm * max(float(here.theta_norm), 1.0) > rounding else 0.0
