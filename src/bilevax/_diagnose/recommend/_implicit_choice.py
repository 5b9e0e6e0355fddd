"""Where the inner solution is what is differentiated, and how."""

import dataclasses

import numpy as np
from jaxtyping import PyTree

from ..._hypergradient._base import AbstractHypergradient
from ..._hypergradient.implicit._implicit import Implicit
from ..._hypergradient.implicit._polished import Polished
from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver
from ..._linear import MINRES
from ..._problem import Bilevel
from ..._tree import default_rtol, tree_size
from ..measure._prospect import Inner
from ..measure._spectrum import Spectrum, spectrum
from ._choice import PRODUCT, Choice
from ._trial import Trial, try_linear_solvers, try_minimum_norm

_LANCZOS_STEPS = 20
# A hypergradient this far off belongs to no neighbourhood of the solution.
_FAR = 0.1


def choose_implicit(
    problem: Bilevel, solver: AbstractInnerSolver, inner: Inner, theta: PyTree, rtol: float
) -> Choice:
    """The implicit rule, or the reason why the steps should be differentiated."""
    ends = spectrum(problem, inner.x, theta, _LANCZOS_STEPS)
    trial = try_linear_solvers(problem, inner, theta, rtol, ends)
    if trial.outcome == "singular":
        trial = try_minimum_norm(problem, inner, theta, rtol)._replace(outcome="singular")
    measured = {
        "curvature": ends.verdict,
        "condition": ends.condition,
        "num_adjoint_products": trial.num_products,
        "error_of_adjoint": trial.error,
        "error_of_x": trial.error_of_x,
    }
    costs = {name: PRODUCT * products + 3 for name, products in trial.costs.items()}
    choice = _choose(problem, solver, inner, ends, trial, rtol)
    return dataclasses.replace(choice, measured=measured, costs=costs)


def _choose(
    problem: Bilevel,
    solver: AbstractInnerSolver,
    inner: Inner,
    ends: Spectrum,
    trial: Trial,
    rtol: float,
) -> Choice:
    is_fixed = isinstance(solver, AbstractSteppingSolver) and solver.is_fixed_length
    is_solved = inner.relative_residual <= default_rtol(inner.x)
    is_indefinite = ends.verdict == "indefinite" or trial.outcome == "negative_curvature"
    if is_fixed and not is_solved and not trial.error_of_x <= _FAR:
        return _stopped_early(inner, trial, is_indefinite)
    if is_indefinite:
        return _indefinite(is_fixed)
    if trial.outcome == "singular":
        reason = (
            "the adjoint system is singular, so that there are many inner solutions: this is the "
            "response of smallest norm"
        )
        return Choice(dataclasses.replace(trial.rule, inexact=is_fixed), reason)
    return _regular(problem, inner, ends, trial, rtol, is_fixed)


def _stopped_early(inner: Inner, trial: Trial, is_indefinite: bool) -> Choice:
    error = f"about {trial.error_of_x:.0%}" if np.isfinite(trial.error_of_x) else "unknown"
    reason = (
        f"the inner solver stops after {inner.num_steps:,} steps, where the error of an implicit "
        f"hypergradient is {error}, while the derivative of the steps is exact for what is run"
    )
    warning = "the curvature is not positive where the steps end." if is_indefinite else ""
    return Choice(Implicit(), reason, warning, wants_steps=True)


def _indefinite(is_fixed: bool) -> Choice:
    warning = (
        "negative curvature: x is no minimum. Run more inner steps, start elsewhere, or "
        "regularise the inner objective."
    )
    if is_fixed:
        reason = "x is no minimum, and the derivative of the steps is defined all the same"
        return Choice(Implicit(), reason, warning, wants_steps=True)
    reason = "x is no minimum, and this solver differentiates any stationary point"
    return Choice(Implicit(MINRES()), reason, warning)


def _regular(
    problem: Bilevel, inner: Inner, ends: Spectrum, trial: Trial, rtol: float, is_fixed: bool
) -> Choice:
    """A system with one solution; polished where x needs it."""
    what = "a minimum" if problem.inner.is_symmetric else "a solution"
    is_polished = 0.5 * rtol < trial.error_of_x < _FAR
    rule: AbstractHypergradient = dataclasses.replace(trial.rule, inexact=is_fixed)
    if is_polished:
        rule = Polished(trial.rule.linear_solver, trial.rule.preconditioner)
    bound = "" if ends.is_exact else " at least"
    where = f"x is {what} of condition number{bound} {ends.condition:.2g}"
    if trial.rule.linear_solver is None:
        how = f"{tree_size(inner.x)} variables are solved for directly"
    else:
        how = (
            f"{trial.num_products} products with its Hessian give {trial.error:.0e} of the "
            "hypergradient"
        )
    reason = f"{where}, where {how}"
    if is_polished:
        reason += f"; x is off by {trial.error_of_x:.0e}, which one Newton step removes"
    warning = ""
    if trial.outcome != "successful":
        warning = f"the adjoint system was not solved to {1e-2 * rtol:.0e} ({trial.outcome})."
    if not is_fixed and not inner.relative_residual <= default_rtol(inner.x):
        warning += f" The inner residual is {inner.relative_residual:.0e}: more inner steps."
    return Choice(rule, reason, warning.strip())
