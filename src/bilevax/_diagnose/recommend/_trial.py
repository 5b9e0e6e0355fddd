"""How exactly the adjoint system must be solved, found by trial."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._hypergradient._base import Estimate
from ..._hypergradient.implicit._implicit import Implicit
from ..._hypergradient.implicit._minimum_norm import MinimumNorm
from ..._linear import CG, GMRES, MINRES, Neumann
from ..._linear._solve_linear import DIRECT_SIZE
from ..._precondition import Jacobi
from ..._problem import Bilevel
from ..._tree import tree_dtype, tree_norm, tree_size
from ..measure._prospect import Inner, look_at_gradient, relative_difference
from ..measure._spectrum import Spectrum

# Of the accuracy that is asked for, this much is left to the linear system.
_SHARE = 0.3
# The tolerances that are tried, in units of that accuracy.
_LADDER = (3.0, 1.0, 0.3, 0.1, 0.03)
# Systems of more steps than this are worth a diagonal, which takes products by itself.
_LONG = 60
_MAX_TERMS = 60


class Trial(NamedTuple):
    """The cheapest linear solve that is accurate enough."""

    rule: Any  # an implicit rule
    num_products: int
    error: float  # of the hypergradient, relative, because of the linear solve
    error_of_x: float  # because of x, at first order
    outcome: str
    costs: dict[str, int]  # products of everything that was accurate enough


def try_linear_solvers(
    problem: Bilevel, inner: Inner, theta: PyTree, rtol: float, ends: Spectrum
) -> Trial:
    """Solve the adjoint system tightly, then ever more exactly until it is exact enough."""
    is_symmetric = problem.inner.is_symmetric
    if is_symmetric and tree_size(inner.x) <= DIRECT_SIZE:
        found = look_at_gradient(problem, inner.x, theta, Implicit(error_estimate=True))
        error_of_x = _relative_error(found)
        products = _num_products(found)
        costs = {"direct": products}
        return Trial(Implicit(), products, 0.0, error_of_x, found.result.name, costs)
    solver = CG if is_symmetric else GMRES
    dtype = tree_dtype(inner.x)
    floor = 1e-10 if dtype == jnp.float64 else 1e-5
    tight_rule = Implicit(solver(rtol=jnp.asarray(max(1e-2 * rtol, floor), dtype)))
    tight = look_at_gradient(problem, inner.x, theta, tight_rule)
    with_error = Implicit(tight_rule.linear_solver, error_estimate=True)
    error_of_x = _relative_error(look_at_gradient(problem, inner.x, theta, with_error))
    outcome = tight.result.name
    name, found = solver.__name__, Trial(Implicit(), 0, np.inf, error_of_x, outcome, {})
    if outcome not in ("successful", "adjoint_not_converged", "stalled"):
        return found._replace(num_products=_num_products(tight))

    def climb(rule_at: Callable[[float], Implicit], name: str, best: Trial) -> Trial:
        for factor in _LADDER:
            tolerance = min(factor * rtol, 0.1)
            looked = look_at_gradient(problem, inner.x, theta, rule_at(tolerance))
            error, products = relative_difference(looked.grad, tight.grad), _num_products(looked)
            if error <= _SHARE * rtol:
                costs = best.costs | {name: products}
                if best.costs and products > 0.7 * best.num_products:
                    return best._replace(costs=costs)
                rule = _with_number(rule_at(tolerance), tolerance)
                return Trial(rule, products, error, error_of_x, outcome, costs)
        return best

    found = climb(lambda r: Implicit(solver(rtol=jnp.asarray(r, dtype))), name, found)
    if is_symmetric and found.num_products > _LONG:
        found = climb(
            lambda r: Implicit(solver(rtol=jnp.asarray(r, dtype)), preconditioner=Jacobi()),
            f"{name} with Jacobi",
            found,
        )
    num_terms = _num_terms(problem, rtol, ends)
    if num_terms and num_terms <= 2 * found.num_products + 5:
        rule = Implicit(Neumann(num_terms))
        looked = look_at_gradient(problem, inner.x, theta, rule)
        error, products = relative_difference(looked.grad, tight.grad), _num_products(looked)
        if error <= _SHARE * rtol:
            costs = found.costs | {f"Neumann({num_terms})": products}
            return Trial(rule, products, error, error_of_x, outcome, costs)
    return found


def try_minimum_norm(problem: Bilevel, inner: Inner, theta: PyTree, rtol: float) -> Trial:
    """For a singular system: one solve for `v` of smallest norm where it is accurate enough.

    `MinimumNorm` solves with safeguards: for every outer variable, or twice, which shows
    whether the solutions move smoothly. Where it finds that they do, once is enough.
    """
    x, dtype = inner.x, tree_dtype(inner.x)
    safe = look_at_gradient(problem, x, theta, MinimumNorm())
    products, outcome = _num_products(safe), safe.result.name
    costs = {"MinimumNorm": products}
    found = Trial(MinimumNorm(), products, 0.0, 0.0, outcome, costs)
    if outcome != "successful" or not problem.inner.is_symmetric:
        return found
    for factor in _LADDER:
        tolerance = factor * rtol
        solver = MINRES(rtol=jnp.asarray(tolerance, dtype), minimum_norm=True)
        looked = look_at_gradient(problem, x, theta, Implicit(solver))
        error, products = relative_difference(looked.grad, safe.grad), _num_products(looked)
        if looked.result.name == "successful" and error <= _SHARE * rtol:
            costs = costs | {"MINRES": products}
            if products > 0.7 * found.num_products:
                return found._replace(costs=costs)
            rule = Implicit(MINRES(rtol=_rounded(tolerance), minimum_norm=True))
            return Trial(rule, products, error, 0.0, outcome, costs)
    return found


def _num_terms(problem: Bilevel, rtol: float, ends: Spectrum) -> int:
    """Of the Neumann series of a fixed point, by its contraction; 0 if there are too many."""
    rate = ends.spectral_radius
    if problem.inner.iteration is None or not rate < 0.9:
        return 0
    num_terms = int(np.ceil(np.log(_SHARE * rtol) / np.log(max(rate, 1e-3)))) + 1
    return num_terms if num_terms <= _MAX_TERMS else 0


def _with_number(rule: Implicit, rtol: float) -> Implicit:
    """The tolerance as a number: for people, and for comparisons of rules."""
    solver: Any = rule.linear_solver
    solver = type(solver)(rtol=_rounded(rtol))
    return Implicit(solver, preconditioner=rule.preconditioner)


def _rounded(number: float) -> float:
    return float(f"{number:.1g}")


def _num_products(estimate: Estimate) -> int:
    return int(estimate.stats["num_hessian_products"])


def _relative_error(estimate: Estimate) -> float:
    size = float(tree_norm(estimate.grad))
    assert estimate.error_estimate is not None  # asked for above
    error = float(estimate.error_estimate)
    return error / size if size > 0 else (0.0 if error == 0 else np.inf)
