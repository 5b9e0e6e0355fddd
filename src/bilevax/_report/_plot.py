"""Pictures."""

from typing import Any

import numpy as np

from .._shown import import_pyplot


def plot_history(history: Any, axes: Any = None) -> Any:
    """Three panels: value; hypergradient and residuals; oracle calls."""
    if axes is None:
        _, axes = import_pyplot().subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    value_axis, residual_axis, count_axis = axes
    steps = history.step
    value_axis.plot(steps, history.value, color="C0")
    value_axis.set(title="Outer objective", xlabel="outer step", ylabel="L(x, theta)")
    for name, label in (
        ("hypergradient_norm", "hypergradient norm"),
        ("inner_residual", "inner residual"),
        ("adjoint_residual", "adjoint residual (relative)"),
        ("error_estimate", "error of the hypergradient"),
        ("predicted_decrease", "decrease predicted for the next step"),
    ):
        column = getattr(history, name)
        if column is not None and np.any(column > 0):
            residual_axis.semilogy(steps, np.where(column > 0, column, np.nan), label=label)
    residual_axis.set(title="How near, how exact", xlabel="outer step")
    residual_axis.legend()
    for name, label in (
        ("num_gradients", "inner and outer gradients"),
        ("num_hessian_products", "Hessian products"),
        ("num_cross_products", "cross products"),
    ):
        count_axis.plot(steps, np.cumsum(getattr(history, name)), label=label)
    count_axis.set(title="Work so far", xlabel="outer step", ylabel="oracle calls")
    count_axis.legend()
    flagged = steps[history.result != "successful"]
    if flagged.size:
        value_axis.plot(flagged, history.value[flagged], "x", color="C3", label="flagged steps")
        value_axis.legend()
    return value_axis.figure
