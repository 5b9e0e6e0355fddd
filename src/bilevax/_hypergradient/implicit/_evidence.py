"""What is known of the error of an implicit hypergradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from ..._inner._base import Counts
from ..._linear import solve_linear
from ..._problem import Bilevel, Linearised, strong_convexity
from ..._results import RESULTS, first_failure
from ..._tree import default_rtol, tree_norm, tree_scale, unbounded
from .._base import Estimate
from .._point import point
from ._adjoint import evidence_solver
from ._bound import BOUND_PRODUCTS, error_bound
from ._refine import Refined, refine_twice, start

# An estimate of an error needs no more digits than this.
_ESTIMATE_RTOL = 1e-2


def with_evidence(
    estimate: Estimate,
    problem: Bilevel,
    theta: PyTree,
    linear_solver: Any,
    preconditioner: Callable | None,
    wants_error: bool,
    polish: bool,
) -> Estimate:
    """`estimate` with an error estimate, polished, with a bound, as far as asked for."""
    modulus = strong_convexity(problem.inner, theta)
    if not (wants_error or polish or modulus is not None):
        return estimate
    x, v = estimate.x, estimate.v
    x_dtype = estimate.inner_residual.dtype
    rtol = default_rtol(x) if polish else _ESTIMATE_RTOL
    solver = evidence_solver(linear_solver, x, problem.inner.is_symmetric, rtol)
    first = start(x, v, estimate.grad, theta)
    refined = refine_twice(problem, theta, first, solver, preconditioner)
    estimate = _counted(estimate, refined)
    if wants_error or polish:
        # Where Newton's method does not contract its step tells nothing of the error.
        is_known = refined.is_contracting & (refined.result == RESULTS.successful)
        error = jnp.where(is_known, refined.change, unbounded(refined.change))
        estimate = dataclasses.replace(estimate, error_estimate=error.astype(x_dtype))
    if polish:
        estimate = _polished(estimate, refined, problem, theta)
    return with_bound(estimate, problem, refined.next_x if polish else refined.x, theta)


def with_bound(estimate: Estimate, problem: Bilevel, newton_x: PyTree, theta: PyTree) -> Estimate:
    """`estimate` with an error bound, if a modulus of strong convexity is known."""
    modulus = strong_convexity(problem.inner, theta)
    if modulus is None:
        return estimate
    bound = error_bound(problem, estimate.x, newton_x, theta, estimate.v, modulus)
    is_known = jnp.isfinite(bound) & (modulus > 0)
    bound = jnp.where(is_known, bound, unbounded(bound)).astype(estimate.inner_residual.dtype)
    estimate = dataclasses.replace(estimate, error_bound=bound)
    return _count(estimate, Counts(hessian=BOUND_PRODUCTS))


def damping_bias(
    at: Linearised, linear_solver: Any, matvec: Callable, damping: Any, v: PyTree, symmetric: bool
) -> tuple[Scalar, Array]:
    """`||damping B^T w||`, `(A + damping I) w = v`, and the products it took.

    `v* - v = damping A^{-1} v`; with the damped matrix instead, the leading term of that.
    """
    w = solve_linear(linear_solver, matvec, v, is_symmetric=symmetric)
    _, cross = at.both(tree_scale(damping, w.value))
    return tree_norm(cross), w.num_products + 1


def _polished(estimate: Estimate, s: Refined, problem: Bilevel, theta: PyTree) -> Estimate:
    at = point(problem, s.x, theta)
    late = RESULTS.where(s.is_contracting, RESULTS.successful, RESULTS.inner_not_converged)
    result = RESULTS.where(s.result == RESULTS.successful, late, s.result)
    result = RESULTS.where(jnp.isfinite(s.change), result, RESULTS.nonfinite)
    return dataclasses.replace(
        estimate,
        value=at.value,
        grad=s.grad,
        aux=at.aux,
        x=s.x,
        v=s.v,
        inner_residual=s.inner_residual,
        adjoint_residual=s.adjoint_residual,
        dual_value=at.dual_value(s.v),
        result=first_failure(estimate.result, result),
    )


def _counted(estimate: Estimate, s: Refined) -> Estimate:
    num = s.num_refinements
    estimate = _count(estimate, Counts(gradients=num, hessian=s.num_products, cross=num))
    stats = dict(estimate.stats)
    stats["num_adjoint_steps"] = stats["num_adjoint_steps"] + s.num_steps
    return eqx.tree_at(lambda e: e.stats, estimate, stats)


def _count(estimate: Estimate, counts: Counts) -> Estimate:
    stats = dict(estimate.stats)
    for name in ("num_gradients", "num_hessian_products", "num_cross_products"):
        stats[name] = stats[name] + getattr(counts, name)
    return eqx.tree_at(lambda e: e.stats, estimate, stats)
