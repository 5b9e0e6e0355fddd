"""A `RuleComparison` as a person reads it."""

import math

from ._comparison import MeasuredRule, RuleComparison

_HEADER = ("rule", "error", "forward", "backward", "memory", "grad", "Hess", "cross", "outcome")


def as_table(found: RuleComparison) -> str:
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


def duration(seconds: float) -> str:
    """With a unit, two digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return (
                f"{seconds / scale:.2g} {unit}"
                if seconds < 100 * scale
                else (f"{seconds / scale:.0f} {unit}")
            )
    return "0" if not math.isnan(seconds) else "-"


def size(num_bytes: float) -> str:
    """With a unit, two digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def _e(found: RuleComparison) -> str:
    return f"{found.reference_error:.0e}"
