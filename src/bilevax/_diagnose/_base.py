"""What `check` found out: one record, and how it reads."""

import dataclasses
import math
from typing import Any

Number = float | int | bool | str


@dataclasses.dataclass(frozen=True)
class Comparison:
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
    - `comparisons`: one `Comparison` for each direction; `disagreement` is the largest gap.
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
    comparisons: tuple[Comparison, ...]
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

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(entry) for key, entry in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(entry) for entry in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        from ._text import as_text  # it knows this record

        return as_text(self)
