"""What `solve` returns."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._results import RESULTS
from .._tree import tree_size
from ._history import COUNTS, History

# With fewer examples for each entry of theta the outer value is not to be believed. A rule of
# thumb: `examples/plot_ridge_per_feature.py` has four for each, and loses as often as it wins.
_EXAMPLES_PER_ENTRY = 10


@dataclasses.dataclass(frozen=True, eq=False)
class BestEvaluation:
    """The best that a run has seen: see `Solution`."""

    theta: PyTree[Array]
    x: PyTree[Array]
    value: Array
    step: int


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The result of a run. `print(solution)` says in a few lines what it is.

    **Attributes:**

    - `x`: the inner solution at `theta`.
    - `theta`: the outer variable after the last step; if the run ended above its start, or
        where nothing could be used, the best one.
    - `value`: `L(x, theta)`; `aux`: what `outer` returned beside it.
    - `result`: the outcome at `theta`; if the run gave up, or ended where nothing could be
        used, why; `not_improved` if it ended above its start.
    - `best`: the best evaluation of the run, with its `theta`, `x`, `value` and outer `step`;
        the last one, if none before was better. Values are compared where they are those of a
        function of theta: x solved for to a tolerance, or by fixed steps from a fixed start.
        Elsewhere (a warm-started rule through few steps, minibatches, evolution strategies)
        the last one is taken, since chance and earlier steps have their part in the values.
    - `history`: a `History`, one row for each outer evaluation.
    - `stats`: `num_steps`, `last_value`, `num_flagged` (outer evaluations that were flagged),
        `stopped_by` ("num_steps", "tolerance", "callback", "optimizer", "interrupt" or
        "failure"), `singular_since` (the outer step from which on `MinimumNorm` stood in for
        `Implicit`, or `None`), `num_outer_rows` (the length that all arrays of the outer data
        share, the number of examples, or `None`), `seconds`, `seconds_first_step`
        (compilation, for the most part) and the totals of the oracle counts.
    """

    x: PyTree[Array]
    theta: PyTree[Array]
    value: Array
    aux: PyTree
    result: RESULTS
    best: BestEvaluation
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
        if self.best.step < stats["num_steps"]:
            best, last = float(self.best.value), stats["last_value"]
            is_best = float(self.value) == best != last
            which = "it is returned" if is_best else "it is in `solution.best`"
            lines.append(
                f"the best theta was that of outer step {self.best.step}, value {best:.6g}, and "
                f"{which}; the last value was {last:.6g}"
            )
        predicted = self.history.predicted_decrease
        if predicted is not None and np.isfinite(predicted[-1]):
            lines.append(f"decrease predicted for the next step: {predicted[-1]:.2g}")
        if stats["num_flagged"]:
            outcomes = self.history.result[self.history.result != "successful"]
            names, counts = np.unique(outcomes, return_counts=True)
            listed = ", ".join(f"{n} ({c})" for n, c in zip(names, counts, strict=True))
            lines.append(f"{stats['num_flagged']} flagged outer evaluations: {listed}")
        if stats["singular_since"] is not None:
            lines.append(
                "singular adjoint systems: the response of smallest norm (bx.MinimumNorm) from "
                f"outer step {stats['singular_since']} on"
            )
        lines += _overfitting(self.theta, stats["num_outer_rows"])
        message = RESULTS[self.result]
        lines.append(f"result: {message}" if message else "result: successful")
        return "\n".join(lines)


def num_rows(data: PyTree) -> int | None:
    """The length of the first axis that all arrays in `data` share, if they do."""
    lengths = {a.shape[0] for a in jtu.tree_leaves(data) if eqx.is_array_like(a) and np.ndim(a)}
    return lengths.pop() if len(lengths) == 1 else None


def _overfitting(theta: PyTree, num_outer_rows: int | None) -> list[str]:
    size = tree_size(eqx.filter(theta, eqx.is_inexact_array))
    if num_outer_rows is None or size < 2 or num_outer_rows >= _EXAMPLES_PER_ENTRY * size:
        return []
    reminder = (
        f"{size} entries of theta were fitted to {num_outer_rows} outer examples: the outer "
        "objective promises more than new data keep. Judge by data that neither level has seen "
        "(callback=...)"
    )
    return [reminder]
