"""The picture of a `Comparison`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._shown import import_pyplot, size


def plot_comparison(found: Any) -> Any:
    """Error against inner steps; error against time, the memory as the size of the points."""
    plt = import_pyplot()
    floor = float(jnp.finfo(found.dtype).eps)  # below it is rounding; a logarithm has no zero
    width = 14 if found.curve is not None else 7
    figure, axes = plt.subplots(
        1, 2 if found.curve is not None else 1, figsize=(width, 4.6), layout="constrained"
    )
    axes = np.atleast_1d(axes)
    if found.curve is not None:
        _plot_curve(axes[0], found.curve, floor)
    _plot_rules(axes[-1], [row for row in found.rows if row.is_usable], floor)
    return figure


def _plot_curve(axis: Any, curve: Any, floor: float) -> None:
    for name, values, style in (
        ("approximate the gradient:\nimplicit hypergradient at $x_k$", curve.implicit, "o-"),
        ("approximate the solution:\nderivative of the first k steps", curve.unrolled, "s-"),
        ("distance of $x_k$ to the solution", curve.distance, "k:"),
    ):
        shown = np.maximum(np.asarray(values, float), floor)
        if np.any(np.isfinite(shown)):
            axis.loglog(curve.num_steps, shown, style, label=name, markersize=5)
    axis.set(
        title="How many inner steps does it need?",
        xlabel=f"inner steps k ({curve.inner_solver})",
        ylabel="relative error",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def _plot_rules(axis: Any, rows: list[Any], floor: float) -> None:
    """A point for each rule, from the time of the inner solve to that of everything."""
    most = max((row.memory_bytes for row in rows), default=1) or 1
    for k, row in enumerate(rows):
        whole = 1e3 * (row.forward_seconds + row.backward_seconds)
        error, color = max(row.error, floor), f"C{k % 10}"
        area = 30 + 500 * (row.memory_bytes / most) ** 0.5
        is_good = row.outcome == "successful"
        flag = "" if is_good else f"\n({row.outcome.replace('_', ' ')})"
        axis.plot([1e3 * row.forward_seconds, whole], [error, error], color=color, lw=1.5)
        axis.scatter(
            [whole],
            [error],
            s=area,
            color=color,
            alpha=0.75,
            marker="o" if is_good else "X",
            label=f"{row.name}: {size(row.memory_bytes)}{flag}",
        )
    axis.set_yscale("log")
    axis.margins(0.15)
    axis.set_xlim(left=0)
    axis.set(
        title="What do the rules cost? (left and low is good)",
        xlabel="milliseconds (a line: from the end of the inner solve)",
        ylabel="relative error of the hypergradient",
    )
    axis.grid(alpha=0.3)
    legend = axis.legend(
        title="working memory (area of the point)",
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
    )
    for handle in legend.legend_handles:
        handle.set_sizes([40])  # otherwise the largest points overlap here
