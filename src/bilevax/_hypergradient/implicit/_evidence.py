"""What is known of the error of an implicit hypergradient."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from ..._inner._base import Counts
from ..._linear import solve_linear
from ..._problem import Bilevel, Linearised, strong_convexity
from ..._results import RESULTS
from ..._tree import tree_dtype, tree_norm, tree_scale, unbounded
from .._at_solution import Adjoint, Solved
from .._base import Query
from ._adjoint import evidence_solver
from ._bound import BOUND_PRODUCTS, error_bound
from ._refine import Refined, refine_twice, start

# An estimate of an error needs no more digits than this.
_ESTIMATE_RTOL = 1e-2


def with_error(
    query: Query, solved: Solved, found: Adjoint, linear_solver: Any, is_wanted: bool
) -> Adjoint:
    """What was found, with an estimate of its error and a bound, as far as asked for."""
    if not (is_wanted or strong_convexity(query.condition, query.theta) is not None):
        return found
    refined, counts = newton_step(query, solved, found, linear_solver, _ESTIMATE_RTOL)
    evidence = {"error_estimate": error_before(refined)} if is_wanted else {}
    bound = bound_at(query.problem, solved.inner.x, refined.x, query.theta, found.v)
    return found.with_evidence(evidence, counts, refined.num_steps).with_evidence(*bound)


def newton_step(
    query: Query, solved: Solved, found: Adjoint, linear_solver: Any, rtol: Any
) -> tuple[Refined, Counts]:
    """One Newton step on x and v together, and what it took."""
    x = solved.inner.x
    solver = evidence_solver(linear_solver, x, query.condition.is_symmetric, rtol)
    first = start(x, found.v, found.grad, query.theta)
    refined = refine_twice(query.problem, query.theta, first, solver, found.preconditioner)
    num = refined.num_refinements
    return refined, Counts(gradients=num, hessian=refined.num_products, cross=num)


def error_before(s: Refined) -> Scalar:
    """Of the hypergradient before the Newton step, how far that moved it."""
    # Where Newton's method does not contract its step tells nothing of the error.
    is_known = s.is_contracting & (s.result == RESULTS.successful)
    return jnp.where(is_known, s.change, unbounded(s.change)).astype(s.inner_residual.dtype)


def bound_at(
    problem: Bilevel, x: PyTree, newton_x: PyTree, theta: PyTree, v: PyTree
) -> tuple[dict[str, Scalar], Counts]:
    """`error_bound` and what it took, if a modulus of strong convexity is known."""
    modulus = strong_convexity(problem.inner, theta)
    if modulus is None:
        return {}, Counts()
    bound = error_bound(problem, x, newton_x, theta, v, modulus)
    is_known = jnp.isfinite(bound) & (modulus > 0)
    bound = jnp.where(is_known, bound, unbounded(bound)).astype(tree_dtype(x))
    return {"error_bound": bound}, Counts(hessian=BOUND_PRODUCTS)


def damping_bias(
    at: Linearised, linear_solver: Any, matvec: Callable, damping: Any, v: PyTree, symmetric: bool
) -> tuple[Scalar, Array]:
    """`||damping B^T w||`, `(A + damping I) w = v`, and the products it took.

    `v* - v = damping A^{-1} v`; with the damped matrix instead, the leading term of that.
    """
    w = solve_linear(linear_solver, matvec, v, is_symmetric=symmetric)
    _, cross = at.both(tree_scale(damping, w.value))
    return tree_norm(cross), w.num_products + 1
