"""A `Check` as a person reads it."""

import math

import numpy as np

from ._base import Check


def as_text(check: Check) -> str:
    """About twenty lines, the verdict last."""
    title = (
        f"bx.check: {check.kind} of {check.size_x} inner and {check.size_theta} outer variables, "
        f"{check.dtype}, {check.rule}"
    )
    lines = [
        title,
        *_inner(check),
        *_spectrum(check),
        *_constants(check),
        *_hypergradient(check),
        f"verdict: {'all agrees' if check.ok else 'NOT OK. ' + check.reason}",
    ]
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"  {name:<22} {text}"


def _inner(c: Check) -> list[str]:
    is_solution = c.inner_residual <= c.inner_tolerance
    word = "a solution" if is_solution else "NOT a solution"
    residual = (
        f"{c.inner_residual:.2e} of {c.inner_scale:.2e}, to reach {c.inner_tolerance:.2e}: {word}"
    )
    distance = "unknown" if math.isnan(c.distance) else f"about {c.distance:.2e}"
    return [
        _row("inner residual", residual),
        _row("distance to x*", f"{distance} (Newton step; ||x|| is {c.x_norm:.3g})"),
    ]


def _spectrum(c: Check) -> list[str]:
    has_eigenvalues = c.kind in {"Minimum", "LeastSquares"}
    word = "eigenvalues" if has_eigenvalues else "singular values"
    name = "curvature" if has_eigenvalues else "derivative in x"
    count = f" ({c.num_singular} below rounding)" if c.num_singular else ""
    if c.is_exact:
        ends = f"{c.smallest:.4g} to {c.largest:.4g}, up to {c.largest_uncertainty:.1e}"
    else:
        ends = (
            f"at most {c.smallest:.4g} to at least {c.largest:.4g} (Lanczos: one within "
            f"{c.smallest_uncertainty:.1e}, {c.largest_uncertainty:.1e} of these)"
        )
    lines = [_row(name, f"{c.curvature}{count}"), _row(word, ends)]
    if not c.is_exact:
        lines.append(_row("", "the smallest may be far below; a quarter is a common guess"))
    if not math.isnan(c.spectral_radius):
        verdict = "iteration converges" if c.spectral_radius < 1 else "iteration does NOT converge"
        lines.append(
            _row(
                "fixed-point map",
                f"spectral radius {c.spectral_radius:.3g}, norm {c.contraction:.3g}: {verdict}",
            )
        )
    bound = "" if c.is_exact else "at least "
    text = f"{bound}{c.condition:.3g}: {c.dtype} reaches {c.attainable:.1e} in the adjoint variable"
    if c.attainable > 1e-3 and c.dtype != "float64" and math.isfinite(c.attainable):
        text += f"; float64 {c.condition * float(np.finfo(np.float64).eps):.1e}"
    lines.append(_row("condition number", text))
    return lines


def _constants(c: Check) -> list[str]:
    what = "gradient" if c.kind in {"Minimum", "LeastSquares"} else "residual"
    return [
        _row(
            "Lipschitz constant",
            f"{c.lipschitz:.4g} of the inner {what}: step size 1/L = {c.step_size:.3g}",
        ),
        _row("||B||", f"{c.cross_norm:.3g}, how theta moves the inner {what}"),
        _row(
            "adjoint smoothness",
            f"{c.adjoint_smoothness:.3g}, Lipschitz constant of d_x L - A'v in x",
        ),
    ]


def _hypergradient(c: Check) -> list[str]:
    residual = c.adjoint_residual
    of_adjoint = "" if residual is None else f"adjoint residual {residual:.1e}, "
    text = (
        f"norm {c.hypergradient_norm:.4g}, {of_adjoint}"
        f"{c.outcome}; at x as given off by {c.error_at_x:.1e}"
    )
    differences = (
        "  against central differences, the inner problem solved again "
        f"(relative residual {c.resolved_residual:.0e}):"
    )
    rows = [
        f"    {row.direction:<14} {row.hypergradient: .8e}  {row.difference: .8e} "
        f"+- {row.uncertainty:.0e}  {'agrees' if row.agrees else 'DISAGREES'} ({row.gap:.0e})"
        for row in c.comparisons
    ]
    lines = [_row("outer value", f"{c.value:.6g}"), _row("hypergradient", text)]
    return [*lines, differences, *rows] if rows else lines
