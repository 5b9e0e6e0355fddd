"""Why a hypergradient is wrong: the causes in the order in which they exclude each other."""

import math
from collections.abc import Callable

from ..._results import RESULTS
from ._record import Check


def most_likely_reason(check: Check) -> str:
    """The first cause that applies, as a sentence with its remedy; empty if all is well."""
    for applies, sentence in _CAUSES:
        if applies(check):
            return sentence(check)
    return ""


def _is_suspect(c: Check) -> bool:
    return not c.agrees or c.outcome != "successful"


def _is_solution(c: Check) -> bool:
    return c.inner_residual <= c.inner_tolerance


def _is_unconverged(c: Check) -> bool:
    # At x* = 0 a residual has no scale: the hypergradient decides.
    return not _is_solution(c) and not c.error_at_x <= c.rtol


def _is_loose(c: Check) -> bool:
    return c.adjoint_residual is not None and c.condition * c.adjoint_residual > 1e-3


def _is_too_coarse(c: Check) -> bool:
    """Whether residuals, of x or of the solver, are rounding and not small enough."""
    floor = 4 * c.eps * c.lipschitz * c.x_norm
    is_far = _is_unconverged(c) and c.inner_residual <= floor
    is_unsolved = c.rtol < c.resolved_residual <= floor / max(c.inner_scale, floor)
    return is_far or is_unsolved or 0.1 < c.attainable < math.inf


def _no_influence(c: Check) -> bool:
    """Whether theta reaches neither the inner residual nor, directly, the outer objective."""
    return c.is_implicit and c.cross_norm == 0 and c.direct_norm == 0


def _is_far(c: Check) -> bool:
    # A small residual and a long way to the next solution: they are not the same one.
    allowed = 10 * c.distance + 1e-2 * c.x_norm + 1e-6
    return _is_solution(c) and c.moved > allowed


def _nonfinite(c: Check) -> str:
    del c
    return f"{RESULTS[RESULTS.nonfinite]}"


def _kink(c: Check) -> str:
    return (
        f"Not smooth here: the one-sided differences of the {c.kink} disagree (a kink such as "
        "abs, max or relu, or the edge of its domain). There is no gradient at such a point; "
        "smooth the function (jax.nn.softplus for relu, jnp.sqrt(x**2 + eps) for abs), or "
        "move away."
    )


def _wrong_derivative(c: Check) -> str:
    return (
        f"JAX' derivative of the {c.wrong_derivative} is not the derivative of its values: "
        "look for stop_gradient, a comparison, rounding to integers, or a wrong custom_jvp or "
        "custom_vjp in it."
    )


def _unreached(c: Check) -> str:
    note = "" if c.dtype == "float64" else f" in {c.dtype}; float64 sees smaller ones"
    return (
        f"Theta moves neither the inner solution (B = 0 up to rounding{note}) nor, directly, the "
        "outer objective: the hypergradient is zero. If theta acts through the algorithm only "
        "(its step size, its start x0), use bx.Unrolled() with the inner solver that you run."
    )


def _not_converged(c: Check) -> str:
    off = "unknown" if math.isnan(c.error_at_x) else f"{c.error_at_x:.1e} (relative)"
    return (
        f"x is not a solution of the inner problem: its residual is {c.inner_residual:.1e} and "
        f"should be {c.inner_tolerance:.1e}. The error of the hypergradient there: {off}. Give "
        "the inner solver more steps or a tighter tolerance; stopped early on purpose, use "
        "bx.Unrolled()."
    )


def _indefinite(c: Check) -> str:
    return (
        f"The Hessian of the inner objective is indefinite at x (an eigenvalue of "
        f"{c.smallest:.3g}): x is a maximum or a saddle point, not a minimum. Start the inner "
        "solve elsewhere, or regularise the inner objective."
    )


def _jumped(c: Check) -> str:
    return (
        "A branch jump: solved again, x lands far from where it was "
        f"(moved by {c.moved:.1e}). The inner problem has several solutions, or a fold is "
        "near, where two of them meet; the hypergradient belongs to one of them. Keep to a "
        "branch by warm starts and short outer steps, or regularise."
    )


def _unresolved(c: Check) -> str:
    return (
        "The inner solver does not solve the inner problem: it stops at a relative residual of "
        f"{c.resolved_residual:.1e}. Differences that are flat in the step are then exact for "
        "another objective, L(x_K(theta), theta), which implicit differentiation does not "
        "differentiate: give the solver more steps, or use bx.Unrolled()."
    )


def _singular(c: Check) -> str:
    note = "" if c.dtype == "float64" else f" Part of that may be the rounding of {c.dtype}."
    return (
        f"A is singular to rounding ({c.num_singular} of the computed eigenvalues): the inner "
        "problem has many solutions, and the adjoint system none. Regularise the inner "
        f"objective, or use bx.MinimumNorm() for the response of smallest norm.{note}"
    )


def _coarse(c: Check) -> str:
    known = f"is known to {c.attainable:.0e} at best" if c.attainable < 1 else "has no digit"
    condition = min(c.condition, 1 / c.eps)
    remedy = "improve the scaling of x"
    if c.dtype != "float64":
        remedy = f"use float64 (jax.config.update('jax_enable_x64', True)), or {remedy}"
    return (
        f"{c.dtype} is too coarse: with a condition number of {condition:.1e} the adjoint "
        f"variable {known}; {remedy}."
    )


def _flagged(c: Check) -> str:
    return (
        f"The hypergradient itself is flagged, {c.outcome}: " + RESULTS[getattr(RESULTS, c.outcome)]
    )


def _loose(c: Check) -> str:
    return (
        f"The adjoint system is solved too loosely: a relative residual of "
        f"{c.adjoint_residual:.1e} at a condition number of {c.condition:.1e} allows this error. "
        "Tighten the linear solver, bx.Implicit(bx.linear.CG(rtol=...)), or precondition it."
    )


def _other(c: Check) -> str:
    return (
        "The differences settle on another value whatever the step, so that another objective "
        f"is differentiated, and not by the causes looked for here. {c.rule} may be inexact on "
        "purpose (OneStep, Truncated, a solver of few steps); otherwise a derivative is wrong "
        "in a few entries, which random directions hardly see."
    )


_CAUSES: tuple[tuple[Callable[[Check], bool], Callable[[Check], str]], ...] = (
    (lambda c: not c.is_finite, _nonfinite),
    (lambda c: c.kink != "", _kink),
    (lambda c: c.wrong_derivative != "", _wrong_derivative),
    (_no_influence, _unreached),
    (lambda c: c.curvature != "indefinite" and c.is_implicit and _is_too_coarse(c), _coarse),
    (lambda c: c.is_implicit and _is_unconverged(c), _not_converged),
    (lambda c: c.curvature == "indefinite" and (c.is_implicit or _is_suspect(c)), _indefinite),
    (lambda c: c.jumps or (c.is_implicit and _is_far(c)), _jumped),
    (lambda c: c.is_implicit and not c.resolved_residual <= c.rtol, _unresolved),
    (lambda c: c.curvature == "singular" and _is_suspect(c), _singular),
    (lambda c: c.attainable > 1e-3 and _is_suspect(c), _coarse),
    (lambda c: c.outcome != "successful", _flagged),
    (
        # The residual of KStep and its kind is reported, and no tolerance of theirs.
        lambda c: not c.agrees and c.is_implicit and _is_loose(c),
        _loose,
    ),
    (lambda c: not c.agrees, _other),
)
