"""What `check` found out: one record, and how it reads."""

import dataclasses
import math
from typing import Any

import numpy as np

from ..._shown import as_json

Number = float | int | bool | str


@dataclasses.dataclass(frozen=True)
class DirectionalDerivative:
    """The derivative of `L(x*(theta), theta)` along one direction, by two ways.

    `hypergradient` and `difference` are the two; `uncertainty` is what the central
    difference is worth; `gap` is how far they are apart, relative to the hypergradient.
    """

    direction: str
    hypergradient: float
    difference: float
    uncertainty: float
    gap: float
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Check:
    """What is true of a problem at a point; made by `bx.check`. `print` it.

    All fields are plain numbers and strings. `A` is the derivative of the inner residual in
    x (the Hessian of the inner objective), `B` its derivative in theta. What does not
    exist is NaN.

    **Attributes:**

    - `kind`, `rule`, `dtype`, `size_x`, `size_theta`: what was checked; `is_implicit`: whether
        the rule differentiates the solution itself, and not the steps of a solver.
    - `ok`: the hypergradient can be trusted here; otherwise `reason` is the most likely cause.
    - `inner_residual`, `inner_scale`, `inner_tolerance`: `||grad_x U||`, what it is compared
        with, and what it has to reach, `rtol` times the scale; `distance`: the length of the
        Newton step, which is the distance to the solution to first order; `x_norm`.
    - `curvature`: "positive definite", "positive definite as far as seen", "singular" or
        "indefinite"; of roots and fixed points "invertible", "invertible as far as seen" or
        "singular".
    - `smallest`, `largest`: extreme eigenvalues of `A`, singular values without symmetry.
        Within `smallest_uncertainty`, `largest_uncertainty` of them there is an eigenvalue;
        if `is_exact`, it is the extreme one. Otherwise the smallest is an upper estimate.
    - `num_singular`: how many of those that were computed are zero up to rounding.
    - `condition`: the condition number, a lower bound unless `is_exact`; `attainable`: the
        relative error of the adjoint variable that the dtype allows, `condition * eps`
        (`eps`: the precision of the dtype).
    - `spectral_radius`, `contraction`: of a fixed point's map, `contraction` its two-norm.
    - `lipschitz`, `step_size`: of the inner gradient, and one over it; `cross_norm`: `||B||`,
        zero if it is rounding;
        `adjoint_smoothness`: the Lipschitz constant of `d_x L - A' v` in x, `v` held.
    - `value`, `hypergradient_norm`, `direct_norm` (`||d_theta L||`), `adjoint_residual`,
        `outcome` (the name of the result): of the hypergradient at the polished x. Rules
        without an adjoint have no residual of it: `None`.
    - `comparisons`: one `DirectionalDerivative` for each direction; `disagreement` is the
        largest gap.
    - `moved`: how far polishing moved x; `error_at_x`: the relative difference of the
        hypergradients at x as it was given and at the polished x.
    - `resolved_residual`: the largest relative inner residual where it was solved again.
    - `kink`, `wrong_derivative`: where, if anywhere, one-sided differences disagree, and where
        JAX' derivative is not that of the values. `jumps`: whether x jumps as theta moves.
    """

    kind: str
    rule: str
    is_implicit: bool
    dtype: str
    size_x: int
    size_theta: int
    inner_residual: float
    inner_scale: float
    inner_tolerance: float
    rtol: float
    distance: float
    x_norm: float
    curvature: str
    is_exact: bool
    smallest: float
    smallest_uncertainty: float
    largest: float
    largest_uncertainty: float
    num_singular: int
    condition: float
    eps: float
    attainable: float
    spectral_radius: float
    contraction: float
    lipschitz: float
    step_size: float
    cross_norm: float
    adjoint_smoothness: float
    value: float
    hypergradient_norm: float
    direct_norm: float
    adjoint_residual: float | None
    outcome: str
    comparisons: tuple[DirectionalDerivative, ...]
    disagreement: float
    moved: float
    error_at_x: float
    resolved_residual: float
    kink: str
    wrong_derivative: str
    jumps: bool
    is_finite: bool
    ok: bool = False
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the hypergradient and the differences agree in every direction."""
        return all(row.agrees for row in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The fields as Python numbers and strings, ready for JSON.

        NaN and infinity, which JSON does not know, become `None`.
        """
        return as_json(self)

    def __str__(self) -> str:
        return as_text(self)


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
