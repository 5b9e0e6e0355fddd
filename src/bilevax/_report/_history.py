"""The history of a run: one row for every outer evaluation."""

import dataclasses
from typing import Any

import numpy as np

COUNTS = ("num_gradients", "num_hessian_products", "num_cross_products")


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What happened, as NumPy arrays with one entry for each outer evaluation.

    Entry `k` belongs to theta after `k` outer steps, except that a flagged step does not move
    theta. The theta that is returned is the last one, unless the `Solution` says otherwise.

    **Attributes:**

    - `value`: `L(x, theta)`.
    - `hypergradient_norm`: two-norm of the hypergradient.
    - `inner_residual`, `adjoint_residual`, `error_estimate`: as in `Estimate`.
    - `predicted_decrease`: the decrease of the value that the optimiser's model of it predicts
        for its next whole step (`OuterLBFGS`, `OuterNewton`). No bound on what is left: the
        model knows the curvature at this theta only. On a long flat tail it stays large where
        the hypergradient does not. NaN for other optimisers.
    - `result`: the outcome, by name.
    - `num_inner_steps`, `num_adjoint_steps`: steps of the two solves.
    - `num_gradients`, `num_hessian_products`, `num_cross_products`: calls of the oracles.
    - `seconds`: wall time since the start of the run, compilation included.
    """

    value: np.ndarray
    hypergradient_norm: np.ndarray
    inner_residual: np.ndarray
    adjoint_residual: np.ndarray
    error_estimate: np.ndarray
    predicted_decrease: np.ndarray
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

        NaN, for what does not exist, becomes `None`, which JSON knows.
        """

        def plain(column: np.ndarray) -> list[Any]:
            return [None if isinstance(a, float) and np.isnan(a) else a for a in column.tolist()]

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def plot(self, axes: Any = None) -> Any:
        """Value, residuals and oracle calls against the outer steps.

        **Arguments:**

        - `axes`: three matplotlib axes; a new figure by default.

        **Returns:** the figure. Needs matplotlib: `pip install 'bilevax[plot]'`.
        """
        from ._plot import plot_history  # matplotlib is optional and slow to import

        return plot_history(self, axes)
