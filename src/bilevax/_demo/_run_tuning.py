"""`python -m bilevax demo tuning`: run, print, draw, write."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ._files import environment, write_json
from ._tuning import METHODS, Comparison, compare, load_split

# Data set, training examples, validation examples.
SETTINGS = (
    ("digits", 200, 400),
    ("digits", 200, 80),
    ("breast_cancer", 100, 200),
    ("breast_cancer", 100, 40),
)
NUM_SPLITS = 5
_COLOURS = ("#667788", "#1b7837", "#b2182b")


def run_tuning(output: Path, seed: int, is_quick: bool) -> dict[str, Any]:
    """Compare one strength per feature with a single one; returns all numbers."""
    settings = SETTINGS[2:3] if is_quick else SETTINGS
    num_splits, num_steps = (2, 3) if is_quick else (NUM_SPLITS, 40)
    print(
        "Logistic regression with one l2 strength per feature, tuned by hypergradients from the "
        f"best single\nstrength of a grid. Mean and standard deviation over {num_splits} "
        "splits of the test loss and accuracy.\n"
    )
    results = {}
    bar = tqdm(total=len(settings) * num_splits, unit="split", disable=None, leave=False)
    for setting in settings:
        comparisons = []
        for k in range(num_splits):
            comparisons.append(compare(load_split(setting[0], seed + k, *setting[1:]), num_steps))
            bar.update(1)
        results[setting] = comparisons
        with bar.external_write_mode():
            print(_describe(setting, comparisons), flush=True)
    bar.close()
    numbers = {
        "environment": environment(),
        "seed": seed,
        "num_steps": num_steps,
        "results": [
            {
                "data": name,
                "num_train": num_train,
                "num_validation": num_validation,
                "splits": [vars(c) for c in comparisons],
            }
            for (name, num_train, num_validation), comparisons in results.items()
        ],
    }
    picture, numbers_file = output / "tuning.png", output / "tuning.json"
    draw_tuning(picture, results)
    write_json(numbers_file, numbers)
    print(f"Written: {picture} and {numbers_file}")
    return numbers


def title(setting: tuple[str, int, int]) -> str:
    name, num_train, num_validation = setting
    return f"{name}: {num_train} training, {num_validation} validation examples"


def _describe(setting: tuple[str, int, int], comparisons: list[Comparison]) -> str:
    lines = [
        title(setting),
        f"  {'':27} {'fitted loss':>16} {'test loss':>16} {'test accuracy':>18}",
    ]
    for method in METHODS:
        columns = [
            _mean_and_spread([getattr(c, name)[method] for c in comparisons], factor, digits)
            for name, factor, digits in (
                ("fit_loss", 1, 3),
                ("test_loss", 1, 3),
                ("test_accuracy", 100, 1),
            )
        ]
        lines.append(f"  {method:27} {columns[0]:>16} {columns[1]:>16} {columns[2]:>16} %")
    flagged = sum(c.num_flagged for c in comparisons)
    if flagged:
        lines.append(f"  {flagged} hypergradients were flagged")
    return "\n".join([*lines, "  " + verdict(comparisons), ""])


def verdict(comparisons: list[Comparison]) -> str:
    """What the test loss says, split by split: a mean alone hides a single bad one."""
    single, stopped, end = METHODS
    words = []
    for method in (stopped, end):
        change = np.array([c.test_loss[method] / c.test_loss[single] - 1 for c in comparisons])
        num_better = int(np.sum(change < -0.001))
        words.append(
            f"{method}: test loss {100 * np.median(change):+.0f} % in the median, lower in "
            f"{num_better} of {len(change)} splits"
        )
    return "; ".join(words) + "."


def _mean_and_spread(values: list[float], factor: float, digits: int) -> str:
    scaled = factor * np.array(values)
    return f"{scaled.mean():.{digits}f} ± {scaled.std(ddof=1):.{digits}f}"


def draw_tuning(path: Path, results: dict[tuple[str, int, int], list[Comparison]]) -> None:
    """Test loss and accuracy of every split, by method."""
    figure = Figure(figsize=(12, 1.5 + 2.9 * len(results)), layout="constrained")
    figure.suptitle(
        "One l2 strength per feature against the best single one\n"
        "(each line one split of the data, the bar the mean)",
        fontsize=15,
    )
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (loss_axis, accuracy_axis), (setting, comparisons) in zip(
        axes, results.items(), strict=True
    ):
        _draw(loss_axis, [c.test_loss for c in comparisons], 1.0)
        _draw(accuracy_axis, [c.test_accuracy for c in comparisons], 100.0)
        loss_axis.set(title=title(setting), ylabel="test loss")
        accuracy_axis.set(title=title(setting), ylabel="test accuracy, %")
    figure.savefig(path, dpi=110)


def _draw(axis: Any, splits: list[dict[str, float]], factor: float) -> None:
    values = factor * np.array([[split[method] for method in METHODS] for split in splits])
    positions = np.arange(len(METHODS))
    axis.plot(positions, values.T, "o-", color="#bbbbbb", markersize=4, linewidth=1)
    for position, mean, colour in zip(positions, values.mean(0), _COLOURS, strict=True):
        axis.hlines(mean, position - 0.18, position + 0.18, color=colour, linewidth=4)
    labels = [method.replace(", ", ",\n").replace("best ", "best\n") for method in METHODS]
    axis.set_xticks(positions, labels)
    axis.margins(x=0.15)
