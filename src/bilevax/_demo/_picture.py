"""The picture of the cleaning: what happened, what was found, what it costs."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ._cleaning import Cleaning, Trained
from ._cost_table import HEADER, Row, cells
from ._digits import Digits

_GOOD, _BAD, _GREY = "#1b7837", "#b2182b", "#666666"


def draw_cleaning(
    path: Path,
    digits: Digits,
    cleaning: Cleaning,
    areas: list[float],
    trained: dict[str, Trained],
    suspects: np.ndarray,
    likely: np.ndarray,
    rows: list[Row],
) -> None:
    """History and accuracies above, suspects in the middle, the cost table below."""
    # matplotlib's own `Figure`: no window, no global state.
    figure = Figure(figsize=(13, 15.6), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(4, 5.2, 6.4))
    top, middle, bottom = parts
    figure.suptitle(
        f"Cleaning a training set: {np.sum(digits.is_wrong)} of {len(digits.train)} digits have "
        "a wrong label",
        fontsize=17,
    )
    _draw_history(top, cleaning, areas, trained, len(digits.test))
    _draw_suspects(middle, digits, suspects, likely)
    _draw_table(bottom, rows)
    figure.savefig(path, dpi=110)


def _draw_history(
    figure: Any,
    cleaning: Cleaning,
    areas: list[float],
    trained: dict[str, Trained],
    num_test: int,
) -> None:
    loss_axis, area_axis, accuracy_axis = figure.subplots(1, 3)
    steps = np.arange(len(areas))
    values = cleaning.solution.history.value[: len(areas)]
    loss_axis.plot(steps, values, "o-", label="validation: theta is fitted to it")
    loss_axis.plot(
        steps,
        cleaning.held_out_losses,
        "s-",
        label="held out (logits scaled at best):\nsays when to stop",
    )
    loss_axis.set(title="Loss on clean images", xlabel="outer step", ylabel="cross-entropy")
    # Without step 0, where all weights are equal and the area is 1/2.
    area_axis.plot(steps[1:], areas[1:], "o-", color=_GREY)
    area_axis.set(
        title="Which labels are wrong?", xlabel="outer step", ylabel="area under the ROC curve"
    )
    for axis in (loss_axis, area_axis):
        axis.axvline(cleaning.best, color=_GOOD, linestyle="--", label="chosen")
        axis.legend(fontsize=10)
    _draw_accuracies(accuracy_axis, trained, num_test)


def _draw_accuracies(axis: Any, trained: dict[str, Trained], num_test: int) -> None:
    for position, (name, result) in enumerate(trained.items()):
        accuracy = result.test_accuracy
        error = (accuracy * (1 - accuracy) / num_test) ** 0.5
        colour = _GOOD if name == "learned weights" else _GREY
        axis.errorbar(100 * accuracy, position, xerr=100 * error, fmt="o", color=colour, capsize=4)
        axis.annotate(
            f"{100 * accuracy:.1f} %",
            (100 * accuracy, position),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontweight="bold",
        )
    axis.set_yticks(range(len(trained)), trained)
    axis.set_ylim(len(trained) - 0.5, -0.7)
    axis.margins(x=0.15)
    axis.set(title="Test accuracy, trained on ...", xlabel="per cent, ± standard error")


def _draw_suspects(figure: Any, digits: Digits, suspects: np.ndarray, likely: np.ndarray) -> None:
    caught = int(np.sum(digits.is_wrong[suspects]))
    figure.suptitle(
        f"The {len(suspects)} most suspect images: given label → likely label "
        f"(green: the given one is wrong indeed, {caught} of {len(suspects)})",
        fontsize=13,
    )
    axes = figure.subplots(3, len(suspects) // 3)
    side = int(digits.train.images.shape[1] ** 0.5)
    for axis, k, label in zip(axes.flat, suspects, likely, strict=True):
        axis.imshow(digits.train.images[k].reshape(side, side), cmap="gray_r")
        axis.set_title(
            f"{digits.train.labels[k]} → {label}",
            fontsize=13,
            color=_GOOD if digits.is_wrong[k] else _BAD,
        )
        axis.axis("off")


def _draw_table(figure: Any, rows: list[Row]) -> None:
    figure.suptitle("One hypergradient of this problem: how wrong, how long, how much", fontsize=13)
    axis = figure.subplots()
    axis.axis("off")
    texts = [cells(row) for row in rows]
    widths = [0.34, 0.08, 0.1, 0.1, 0.08, 0.1, 0.1, 0.1]
    table = axis.table(texts, colLabels=HEADER, colWidths=widths, loc="center", cellLoc="right")
    table.auto_set_font_size(False)
    table.set_fontsize(11)
    table.scale(1, 1.5)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor("#dddddd")
        if column < 2:
            cell.set_text_props(ha="left")
            cell.PAD = 0.03
        if line == 0:
            cell.set_text_props(fontweight="bold")
        elif rows[line - 1].start == "warm":
            cell.set_facecolor("#f2f5f8")
