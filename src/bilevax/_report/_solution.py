"""What `solve` returns."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree

from .._results import RESULTS
from ._history import COUNTS, History


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The result of a run. `print(solution)` says in a few lines what it is.

    **Attributes:**

    - `x`: the inner solution at `theta`.
    - `theta`: the outer variable after the last step or, if the value was lower before, after
        the best one. Values are compared where they are those of a function of theta: x
        solved for to a tolerance, or by fixed steps from a fixed start. Elsewhere (a
        warm-started rule through few steps, minibatches, evolution strategies) the last theta
        is returned, since chance and earlier steps have their part in the values.
    - `value`: `L(x, theta)`; `aux`: what `outer` returned beside it.
    - `result`: the outcome at `theta`; if the run gave up, or ended where nothing could be
        used, why; `not_improved` if no step improved on the start.
    - `history`: a `History`, one row for each outer evaluation.
    - `stats`: `num_steps`, `best_step` (the outer step that `theta` belongs to), `last_value`,
        `num_flagged` (outer evaluations that were flagged),
        `stopped_by` ("num_steps", "tolerance", "callback", "optimizer", "interrupt" or
        "failure"), `singular_since` (the outer step from which on `MinimumNorm` stood in for
        `Implicit`, or `None`), `rule_reason` (with `rule="auto"`: which rule, and why; else
        `None`), `seconds`, `seconds_first_step` (compilation, for the most part) and
        the totals of the oracle counts.
    """

    x: PyTree[Array]
    theta: PyTree[Array]
    value: Array
    aux: PyTree
    result: RESULTS
    history: History
    stats: dict[str, Any]

    def plot(self) -> Any:
        """The history as a picture; see `History.plot`."""
        return self.history.plot()

    def __str__(self) -> str:
        stats = self.stats
        first = float(self.history.value[0]) if len(self.history) else float("nan")
        progress = (
            f"outer objective {first:.6g} -> {float(self.value):.6g} in {stats['num_steps']} "
            f"outer steps ({stats['seconds']:.2f} s, stopped by {stats['stopped_by']})"
        )
        lines = [
            progress,
            ", ".join(f"{stats[name]} {name[4:].replace('_', ' ')}" for name in COUNTS),
        ]
        if stats["best_step"] < stats["num_steps"]:
            lines.append(
                f"theta is that of outer step {stats['best_step']}, the best of the run: the last "
                f"value was {stats['last_value']:.6g}"
            )
        predicted = self.history.predicted_decrease[-1] if len(self.history) else np.nan
        if np.isfinite(predicted):
            lines.append(f"decrease predicted for the next step: {predicted:.2g}")
        if stats["num_flagged"]:
            outcomes = self.history.result[self.history.result != "successful"]
            names, counts = np.unique(outcomes, return_counts=True)
            listed = ", ".join(f"{n} ({c})" for n, c in zip(names, counts, strict=True))
            lines.append(f"{stats['num_flagged']} flagged outer evaluations: {listed}")
        if stats.get("rule_reason"):
            lines.append(f"rule: {stats['rule_reason']}")
        if stats["singular_since"] is not None:
            lines.append(
                "singular adjoint systems: the response of smallest norm (bx.MinimumNorm) from "
                f"outer step {stats['singular_since']} on"
            )
        message = RESULTS[self.result]
        lines.append(f"result: {message}" if message else "result: successful")
        return "\n".join(lines)
