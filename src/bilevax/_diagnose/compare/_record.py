"""What `compare` found out: records, and where their picture comes from."""

import dataclasses
import math
from typing import Any

from ..._shown import as_json, duration, size


@dataclasses.dataclass(frozen=True)
class MeasuredRule:
    """One rule on one problem.

    **Attributes:**

    - `name`: what it is called in the table; `inner_solver`: what it was run with.
    - `error`: of its hypergradient against the reference, relative; NaN if it cannot be used.
    - `forward_seconds`: the inner solve alone; `backward_seconds`: what the hypergradient
        takes beyond it. Medians of compiled calls, taken in turn with the other rules.
    - `memory_bytes`: the peak of the compiled program, beside its arguments and results.
    - `num_inner_steps`, `num_adjoint_steps`, `num_gradients`, `num_hessian_products`,
        `num_cross_products`: the `stats` of its estimate.
    - `outcome`: the name of its result, or "not usable".
    - `message`: why it cannot be used, shortened; otherwise empty.
    """

    name: str
    inner_solver: str
    error: float = float("nan")
    forward_seconds: float = float("nan")
    backward_seconds: float = float("nan")
    memory_bytes: int = 0
    num_inner_steps: int = 0
    num_adjoint_steps: int = 0
    num_gradients: int = 0
    num_hessian_products: int = 0
    num_cross_products: int = 0
    outcome: str = "not usable"
    message: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether there is a hypergradient at all."""
        return not self.message


@dataclasses.dataclass(frozen=True)
class ErrorCurve:
    """Errors after `num_steps` inner steps, relative; one tuple for each.

    `implicit`: of the implicit hypergradient at `x_k`, an approximate gradient of the exact
    problem. `unrolled`: of the derivative of `L(x_k(theta), theta)`, the exact gradient of
    an approximate problem; NaN if the steps cannot be differentiated. `distance`:
    `||x_k - x*|| / ||x*||`. `inner_solver`: whose steps these are.
    """

    inner_solver: str
    num_steps: tuple[int, ...]
    implicit: tuple[float, ...]
    unrolled: tuple[float, ...]
    distance: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rules side by side on one problem; made by `bx.compare`. `print` it.

    **Attributes:**

    - `rows`: one `MeasuredRule` for each rule, in the order in which they were given.
    - `curve`: an `ErrorCurve`, or `None` where the inner problem has no steps to look at.
    - `reference`: what the errors are measured against; `reference_error`: an estimate of
        its own relative error (NaN if nothing is known of it).
    - `hypergradient_norm`: of the reference. `size_x`, `size_theta`, `dtype`, `kind`.
    - `notes`: what a reader should know, such as which solver stands in for another.
    """

    rows: tuple[MeasuredRule, ...]
    curve: ErrorCurve | None
    reference: str
    reference_error: float
    hypergradient_norm: float
    kind: str
    size_x: int
    size_theta: int
    dtype: str
    notes: tuple[str, ...]

    def to_records(self) -> list[dict[str, Any]]:
        """One dictionary a rule: `pandas.DataFrame(found.to_records())` is a table."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Everything as Python numbers and strings, ready for JSON; NaN becomes `None`."""
        return as_json(self)

    def plot(self, path: Any = None) -> Any:
        """One figure: error against inner steps, error against time and memory.

        Saved to `path`, if one is given. Needs matplotlib: `pip install 'bilevax[plot]'`.
        """
        from ._picture import plot_comparison  # it knows this record

        figure = plot_comparison(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        return as_table(self)


_HEADER = ("rule", "error", "forward", "backward", "memory", "grad", "Hess", "cross", "outcome")


def as_table(found: Comparison) -> str:
    """A title, the reference, one line for each rule, the notes."""
    title = (
        f"bx.compare: {found.kind} of {found.size_x} inner and {found.size_theta} outer variables, "
        f"{found.dtype}"
    )
    worth = "" if math.isnan(found.reference_error) else f", itself off by {_e(found)}"
    reference = (
        f"errors are relative to {found.reference} (norm {found.hypergradient_norm:.4g}{worth})"
    )
    lines = [list(_HEADER)]
    lines += [_cells(row) for row in found.rows if row.is_usable]
    widths = [max(len(line[k]) for line in lines) for k in range(len(_HEADER))]
    last = len(_HEADER) - 1
    table = [
        "  ".join(
            cell.ljust(widths[k]) if k in (0, last) else cell.rjust(widths[k])
            for k, cell in enumerate(line)
        ).rstrip()
        for line in lines
    ]
    absent = [f"{row.name}: not usable. {row.message}" for row in found.rows if not row.is_usable]
    return "\n".join([title, reference, *(f"  {line}" for line in [*table, *absent, *found.notes])])


def _cells(row: MeasuredRule) -> list[str]:
    return [
        row.name,
        f"{row.error:.1e}",
        duration(row.forward_seconds),
        duration(row.backward_seconds),
        size(row.memory_bytes),
        str(row.num_gradients),
        str(row.num_hessian_products),
        str(row.num_cross_products),
        row.outcome,
    ]


def _e(found: Comparison) -> str:
    return f"{found.reference_error:.0e}"
