"""What the errors of rules are measured against."""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..._as_written import as_written
from ..._hypergradient._base import AbstractHypergradient
from ..._hypergradient._entry import hypergradient
from ..._hypergradient.implicit._implicit import Implicit
from ..._hypergradient.implicit._minimum_norm import MinimumNorm
from ..._hypergradient.unrolled._unrolled import Unrolled
from ..._inner._base import AbstractInnerSolver
from ..._linear import CG, GMRES, Direct
from ..._linear._solve_linear import DIRECT_SIZE
from ..._problem import Bilevel, start_at
from ..._tree import is_bounded, tree_norm, tree_size
from ..check._check import tight_solver


class Reference(NamedTuple):
    """A hypergradient, the solution it was taken at (if it is one), and what it is worth."""

    grad: PyTree
    x: PyTree | None
    name: str
    error: float  # relative, NaN if nothing is known of it
    note: str = ""
    is_singular: bool = False


def find_reference(
    problem: Bilevel,
    solver: AbstractInnerSolver,
    x0: PyTree,
    theta: PyTree,
    given: Any,
    path: str,
) -> Reference:
    """`given` as a reference; by default the exact solution's, or that of the steps."""
    if isinstance(given, AbstractHypergradient):
        estimate = _estimate(problem, solver, x0, theta, given)
        name = f"{as_written(given)}, with the inner solver as it is"
        return Reference(estimate.grad, None, name, float("nan"), _flag(estimate))
    tight = _tight(problem, x0, theta)
    if given is not None:
        return tight._replace(grad=_checked(given, theta), name="the gradient given", error=np.nan)
    if path:
        estimate = _estimate(problem, solver, x0, theta, Unrolled())
        name = f"the exact derivative of the steps, because {path}"
        return Reference(estimate.grad, tight.x, name, float("nan"), _flag(estimate))
    return tight


def _tight(problem: Bilevel, x0: PyTree, theta: PyTree) -> Reference:
    """At an inner solution solved as far as the dtype goes."""
    start = start_at(x0, theta)
    solver = tight_solver(problem.inner, start)
    tolerance = solver.rtol * 10
    linear_solver: Any = CG(rtol=tolerance) if problem.inner.is_symmetric else GMRES(rtol=tolerance)
    linear_solver = Direct() if tree_size(start) <= DIRECT_SIZE else linear_solver
    rule = Implicit(linear_solver, error_estimate=True)
    estimate = _estimate(problem, solver, start, theta, rule)
    name = "the implicit hypergradient at an inner solution as exact as the dtype allows"
    if estimate.result.name == "singular":
        estimate = _estimate(problem, solver, start, theta, MinimumNorm())
        name = "the response of smallest norm at such a solution (the inner problem has many)"
        return Reference(estimate.grad, estimate.x, name, np.nan, _flag(estimate), True)
    assert estimate.error_estimate is not None
    norm, error = float(tree_norm(estimate.grad)), estimate.error_estimate
    worth = float(error) / norm if norm > 0 and is_bounded(error) else float("nan")
    return Reference(estimate.grad, estimate.x, name, worth, _flag(estimate))


def _estimate(
    problem: Bilevel, solver: Any, x0: PyTree, theta: PyTree, rule: AbstractHypergradient
) -> Any:
    with warnings.catch_warnings():
        # What theta does not reach here it may reach by the steps that are compared.
        warnings.filterwarnings("ignore", "The hypergradient in", UserWarning)
        return hypergradient(problem, x0, theta, inner_solver=solver, rule=rule, throw=False)[0]


def _flag(estimate: Any) -> str:
    outcome = estimate.result.name
    is_good = outcome in ("successful", "stalled")
    return "" if is_good else f"note: the reference itself is flagged, {outcome}."


def _checked(given: PyTree, theta: PyTree) -> PyTree:
    """The user's gradient, in the structure and dtypes of theta."""

    def shapes(tree: PyTree) -> list:
        return [np.shape(leaf) for leaf in jtu.tree_leaves(tree)]

    if shapes(given) != shapes(theta):
        raise ValueError(
            "compare(reference=...) must be a rule or a gradient in the structure of theta, "
            f"{shapes(theta)}; got {shapes(given)}."
        )
    leaves = zip(jtu.tree_leaves(given), jtu.tree_leaves(theta), strict=True)
    arrays = [jnp.asarray(a, b.dtype) for a, b in leaves]
    return jtu.tree_unflatten(jtu.tree_structure(theta), arrays)
