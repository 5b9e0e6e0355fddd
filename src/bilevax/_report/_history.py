"""The history of a run: one row for every outer evaluation."""

import dataclasses
from typing import Any

import numpy as np

COUNTS = ("num_gradients", "num_hessian_products", "num_cross_products")


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What happened, as NumPy arrays with one entry for each outer evaluation.

    Entry `k` belongs to theta after `step[k]` outer steps, except that a flagged step does not
    move theta. The theta that is returned is the last one, unless the `Solution` says otherwise.

    **Attributes:**

    - `step`: how many outer steps there were before. After each one a `DoubleLoop` evaluates; a
        `SingleLoop` after each `evaluate_every`.
    - `value`: `L(x, theta)`.
    - `hypergradient_norm`: two-norm of the hypergradient.
    - `inner_residual`, `adjoint_residual`, `error_estimate`: as in `Estimate`; `None` where
        the rule does not know them (NaN at its steps, where another one stood in for it).
    - `predicted_decrease`: the decrease of the value that the optimiser's model of it predicts
        for its next whole step (`OuterLBFGS`, `OuterNewton`). No bound on what is left: the
        model knows the curvature at this theta only. On a long flat tail it stays large where
        the hypergradient does not. `None` for other optimisers.
    - `result`: the outcome, by name.
    - `num_inner_steps`, `num_adjoint_steps`: steps of the two solves.
    - `num_gradients`, `num_hessian_products`, `num_cross_products`: calls of the oracles.
    - `seconds`: wall time since the start of the run, compilation included.
    """

    step: np.ndarray
    value: np.ndarray
    hypergradient_norm: np.ndarray
    inner_residual: np.ndarray
    adjoint_residual: np.ndarray | None
    error_estimate: np.ndarray | None
    predicted_decrease: np.ndarray | None
    result: np.ndarray
    num_inner_steps: np.ndarray
    num_adjoint_steps: np.ndarray
    num_gradients: np.ndarray
    num_hessian_products: np.ndarray
    num_cross_products: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.value)

    def to_dict(self) -> dict[str, list[Any]]:
        """The columns as lists of Python numbers, ready for JSON or a data frame.

        What is not known, and NaN, becomes `None`, which JSON knows.
        """

        def plain(column: np.ndarray | None) -> list[Any]:
            entries = [None] * len(self) if column is None else column.tolist()
            return [None if isinstance(a, float) and np.isnan(a) else a for a in entries]

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def plot(self, axes: Any = None) -> Any:
        """Value, residuals and oracle calls against the outer steps.

        **Arguments:**

        - `axes`: three matplotlib axes; a new figure by default.

        **Returns:** the figure. Needs matplotlib: `pip install 'bilevax[plot]'`.
        """
        from ._plot import plot_history  # matplotlib is optional and slow to import

        return plot_history(self, axes)


def joined(rows: list[dict[str, Any]], name: str) -> Any:
    """One column of all rows; NaN where the rule of those rows does not know it.

    `None` if no row has it.
    """
    parts = [row[name] for row in rows]
    if all(part is None for part in parts):
        return None
    lengths = [len(row["value"]) for row in rows]
    blank = [np.full(length, np.nan) for length in lengths]
    return np.concatenate([b if a is None else a for a, b in zip(parts, blank, strict=True)])
