"""`python -m bilevax demo cleaning`: run, print, draw, write."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from ._cleaning import (
    CLEANING_L2,
    Cleaning,
    Trained,
    clean,
    cleaning_problem,
    initial_point,
    predict,
    train,
)
from ._cost_table import Row, format_table, measure_costs
from ._digits import Digits, load_digits
from ._files import environment, write_json
from ._picture import draw_cleaning

QUICK_SIZES = (300, 100, 50, 100)
NUM_SUSPECTS = 36


def run_cleaning(output: Path, seed: int, is_quick: bool) -> dict[str, Any]:
    """Clean the training set, measure what the rules cost; returns all numbers."""
    digits = load_digits(seed, QUICK_SIZES) if is_quick else load_digits(seed)
    _introduce(digits)
    cleaning = clean(digits, num_steps=5 if is_quick else 60)
    areas = [_area(digits, theta) for theta in cleaning.thetas]
    _report_steps(cleaning, areas)
    trained = train_all(digits, cleaning)
    _report_accuracies(trained)
    suspects = np.argsort(cleaning.theta)[:NUM_SUSPECTS]
    print(
        f"Of the {NUM_SUSPECTS} most suspect images {np.sum(digits.is_wrong[suspects])} have a "
        "wrong label.\n"
    )
    step = max(cleaning.best // 2, 1)  # at the best theta there is nothing left to be right about
    print(
        f"What one hypergradient costs on this problem, in the middle of the run (step {step}):\n"
    )
    rows = _costs(digits, cleaning, step, is_quick)
    print(format_table(rows))
    numbers = _numbers(digits, cleaning, areas, trained, suspects, seed)
    numbers |= {"cost_table_step": step, "cost_table": [vars(row) for row in rows]}
    likely = predict(trained["learned weights"].x, digits.train.images[suspects])
    picture, numbers_file = output / "cleaning.png", output / "cleaning.json"
    draw_cleaning(picture, digits, cleaning, areas, trained, suspects, likely, rows)
    write_json(numbers_file, numbers)
    print(f"\nWritten: {picture} and {numbers_file}")
    return numbers


def train_all(digits: Digits, cleaning: Cleaning) -> dict[str, Trained]:
    """The final classifiers: four training sets, one way of training."""
    everything = np.ones(len(digits.train))
    weights = 1.0 / (1.0 + np.exp(-cleaning.theta))
    return {
        "everything": train(digits.train, everything, digits),
        "learned weights": train(digits.train, weights, digits),
        "clean part only": train(digits.train, 1.0 - digits.is_wrong, digits),
        "validation only": train(digits.validation, np.ones(len(digits.validation)), digits),
    }


def _area(digits: Digits, theta: np.ndarray) -> float:
    """Of the ROC curve of "which labels are wrong": 1 is perfect, 0.5 is guessing."""
    return float(roc_auc_score(digits.is_wrong, -theta))


def _costs(digits: Digits, cleaning: Cleaning, step: int, is_quick: bool) -> list[Row]:
    x0, _ = initial_point(digits)
    theta, before = (jnp.asarray(cleaning.thetas[k]) for k in (step, step - 1))
    num_steps, num_repeats = (10, 1) if is_quick else (100, 3)
    return measure_costs(cleaning_problem(digits), x0, theta, before, num_steps, num_repeats)


def _introduce(digits: Digits) -> None:
    print(
        f"{len(digits.train)} training images of digits, {np.sum(digits.is_wrong)} of them with "
        f"a wrong label.\n"
        f"theta: one weight per training image, fitted to {len(digits.validation)} clean images; "
        f"{len(digits.held_out)} more say when to stop;\n"
        f"{len(digits.test)} test images are kept for the end.\n"
    )


def _report_steps(cleaning: Cleaning, areas: list[float]) -> None:
    stats = cleaning.solution.stats
    best = cleaning.best
    print(
        f"{stats['num_steps']} outer steps in {stats['seconds']:.1f} s, of which "
        f"{stats['seconds_first_step']:.1f} s for the first one, with compilation "
        f"({stats['num_gradients']} gradients, {stats['num_hessian_products']} Hessian "
        f"products, {stats['num_cross_products']} cross products).\n"
        f"Stopped by: {stats['stopped_by']}. Least held-out loss after {best} steps.\n\n"
        "Which labels are wrong? Area under the ROC curve, from the learned weights:\n"
        f"  after 1 step {areas[1]:.3f}, chosen (step {best}) {areas[best]:.3f}, "
        f"last (step {len(areas) - 1}) {areas[-1]:.3f}\n"
    )


def _report_accuracies(trained: dict[str, Trained]) -> None:
    print("Test accuracy, each trained anew with the l2 strength that held-out images choose:")
    for name, result in trained.items():
        print(f"  {name:15} {100 * result.test_accuracy:5.1f} %   (l2 = {result.l2:g})")
    print()


def _numbers(
    digits: Digits,
    cleaning: Cleaning,
    areas: list[float],
    trained: dict[str, Trained],
    suspects: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    return {
        "environment": environment(),
        "seed": seed,
        "sizes": {
            name: len(getattr(digits, name)) for name in ("train", "validation", "held_out", "test")
        },
        "num_wrong": int(np.sum(digits.is_wrong)),
        "cleaning_l2": CLEANING_L2,
        "best_step": cleaning.best,
        "roc_areas": areas,
        "held_out_losses": cleaning.held_out_losses,
        "history": cleaning.solution.history.to_dict(),
        "stats": cleaning.solution.stats,
        "trained": {
            name: {
                "test_accuracy": result.test_accuracy,
                "held_out_loss": result.held_out_loss,
                "l2": result.l2,
            }
            for name, result in trained.items()
        },
        "suspects": suspects.tolist(),
        "num_suspects_wrong": int(np.sum(digits.is_wrong[suspects])),
    }
