"""An estimate on one line."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, PyTree

from .._results import RESULTS
from .._tree import is_traced, tree_norm, tree_size

# The evidence, its name in a line, and the tolerance that it is compared with.
_EVIDENCE = (
    ("inner_residual", "inner residual", "inner_tolerance"),
    ("adjoint_residual", "adjoint residual", "adjoint_tolerance"),
    ("error_estimate", "error estimate", None),
    ("error_bound", "error bound", None),
)


def summary(estimate: Any) -> str:
    """What an estimate says, on one line; of a batch, how its problems ended."""
    name = type(estimate).__name__
    if not all(map(eqx.is_array_like, (estimate.value, estimate.result.index))):
        return eqx.tree_pformat(estimate)  # a tree of something else, of axes say
    if is_traced(estimate):
        return f"{name}(traced: grad {_shapes(estimate.grad)}, x {_shapes(estimate.x)})"
    if np.ndim(estimate.value) > 0:
        return f"{name}(batch of {np.shape(estimate.value)}: {_outcomes(estimate.result)})"
    parts = [
        f"value {float(estimate.value):.6g}",
        f"norm of grad {float(tree_norm(estimate.grad)):.3g} ({_entries(estimate.grad)})",
    ]
    for field, words, tolerance in _EVIDENCE:
        found = getattr(estimate, field)
        if found is not None:
            asked = None if tolerance is None else getattr(estimate, tolerance)
            asked = "" if asked is None else f" (asked: {float(asked):.2g})"
            parts.append(f"{words} {float(found):.2g}{asked}")
    if estimate.is_bilevel is not None and not estimate.is_bilevel:
        parts.append("the derivative of these steps, not of a solution")
    return f"{name}({', '.join(parts)}; {estimate.result!r})"


def _entries(tree: PyTree[Array]) -> str:
    size = tree_size(tree)
    return "1 entry" if size == 1 else f"{size} entries"


def _shapes(tree: PyTree[Array]) -> str:
    return " ".join(eqx.tree_pformat(tree).split())


def _outcomes(result: RESULTS) -> str:
    names, counts = np.unique(
        np.array(RESULTS.names())[np.asarray(result.index)], return_counts=True
    )
    return ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
