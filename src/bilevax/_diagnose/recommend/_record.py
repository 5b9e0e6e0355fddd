"""What `recommend` found out: one record, and how it reads."""

import dataclasses
from typing import Any

from ..._as_written import as_written
from ..._hypergradient._base import AbstractHypergradient
from ..._shown import as_json


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """A rule for a problem, and why; made by `bx.recommend`. `print` it.

    **Attributes:**

    - `rule`: the rule, ready for `bx.hypergradient` and `bx.solve`.
    - `inner_solver`: the one that it is meant for, as it was given.
    - `reason`: one sentence.
    - `warning`: what is suspicious about the problem; empty if nothing is.
    - `measured`: the numbers that decided. `num_inner_steps`; `contraction` of the inner
        residual for each of them (NaN unless the solver is a `Descent` or the problem a
        fixed point); `relative_residual`, against what the default tolerance is compared
        with; `size_x`, `size_theta`; `state_bytes` of one state of the inner solver (0 if it
        takes no steps that JAX sees); `cross_norm`, roughly `||B||`; and, where the rule
        depends on them, `curvature`, `condition`, `num_adjoint_steps`, `adjoint_rtol`,
        `error_of_adjoint` and `error_of_x`, relative to the hypergradient.
    - `costs`: of each rule that was considered the predicted cost beside the inner solve, in
        inner gradients.
    """

    rule: AbstractHypergradient
    inner_solver: Any
    reason: str
    warning: str
    measured: dict[str, Any]
    costs: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything as Python numbers and strings, ready for JSON; NaN becomes `None`."""
        return {
            "rule": as_written(self.rule),
            "inner_solver": None if self.inner_solver is None else as_written(self.inner_solver),
            "reason": self.reason,
            "warning": self.warning,
            "measured": as_json(self.measured),
            "costs": as_json(self.costs),
        }

    def __str__(self) -> str:
        lines = [f"bx.recommend: {as_written(self.rule)}", f"  because {self.reason}"]
        if self.warning:
            lines.append(f"  WARNING: {self.warning}")
        numbers = [
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.3g}'}"
            for name, value in self.measured.items()
        ]
        half = (len(numbers) + 1) // 2
        lines += [f"  measured  {', '.join(numbers[:half])},"]
        lines += [f"            {', '.join(numbers[half:])}"]
        if self.costs:
            listed = ", ".join(f"{name} {cost:.0f}" for name, cost in self.costs.items())
            lines.append(f"  predicted cost beside the inner solve, in gradients: {listed}")
        return "\n".join(lines)
