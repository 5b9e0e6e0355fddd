"""Tuning: one l2 strength per feature against the best single one.

    inner   U(x, theta) = mean training loss + 1/2 sum_j exp(theta_j) ||x_j||^2
    outer   L(x)        = mean validation loss

with x a softmax classifier, x_j its weights for feature j.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import bilevax as bx

# Of log strengths: from nearly none to nearly no classifier.
LOG_GRID = np.linspace(np.log(1e-5), np.log(1.0), 13)


@dataclasses.dataclass(frozen=True)
class Split:
    """Standardised features and labels of the parts, by name.

    The single strength is chosen on all of the validation data. Theta is fitted to three
    quarters of them, `fit`, so that the last quarter, `stop`, can say when to stop.
    """

    train: dict[str, np.ndarray]
    fit: dict[str, np.ndarray]
    stop: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int

    @property
    def validation(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([self.fit[name], self.stop[name]]) for name in self.fit}


def load_split(name: str, seed: int, num_train: int, num_validation: int) -> Split:
    """`breast_cancer` or `digits` of scikit-learn; what is left over is for the test."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    rest = np.arange(len(labels))
    parts = []
    for size in (num_train, num_validation - num_validation // 4, num_validation // 4):
        part, rest = train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=seed
        )
        parts.append(part)
    # By the training part alone; some pixels of the digits are always white.
    mean, spread = features[parts[0]].mean(0), features[parts[0]].std(0)
    features = (features - mean) / np.where(spread > 0, spread, 1.0)
    data = [{"features": features[k], "labels": labels[k]} for k in (*parts, rest)]
    return Split(*data, num_classes=int(labels.max()) + 1)


def loss(x: PyTree, data: PyTree) -> Array:
    """The mean cross-entropy."""
    logits = data["features"] @ x["weights"] + x["bias"][None, :]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"]))


def inner(x: PyTree, theta: Array, data: PyTree) -> Array:
    """The training loss, every feature with its own strength."""
    penalty = jnp.sum(jnp.exp(theta)[:, None] * x["weights"] ** 2)
    # Equal biases change nothing but the conditioning; this picks one of the solutions.
    return loss(x, data) + 0.5 * penalty + 0.5e-3 * jnp.sum(x["bias"] ** 2)


def outer(x: PyTree, theta: Array, data: PyTree) -> Array:
    """The validation loss."""
    del theta
    return loss(x, data)


METHODS = ("best single strength", "per feature, stopped early", "per feature, to the end")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of one split, by method: losses and accuracy; and the step that early stopping chose."""

    fit_loss: dict[str, float]
    test_loss: dict[str, float]
    test_accuracy: dict[str, float]
    chosen_step: int
    num_flagged: int


def compare(split: Split, num_steps: int = 40) -> Comparison:
    """The best single strength of the grid, and from there one strength per feature."""
    num_features = split.train["features"].shape[1]
    x0 = {
        "weights": jnp.zeros((num_features, split.num_classes)),
        "bias": jnp.zeros(split.num_classes),
    }
    problem = bx.Bilevel(inner, outer, inner_data=split.train, outer_data=split.fit)
    x, theta = _best_single(problem, x0, num_features, split)
    path = [x]
    path_losses = [_on(loss, x, split.stop)]

    def watch(progress: bx.Progress) -> None:
        path.append(progress.x)
        path_losses.append(_on(loss, progress.x, split.stop))

    solution = bx.solve(
        problem, x, theta, _METHOD, num_steps=num_steps, callback=watch, progress=False
    )
    chosen = int(np.argmin(path_losses))
    found = dict(zip(METHODS, (x, path[chosen], solution.x), strict=True))
    return Comparison(
        fit_loss={name: _on(loss, x, split.fit) for name, x in found.items()},
        test_loss={name: _on(loss, x, split.test) for name, x in found.items()},
        test_accuracy={name: _on(_accuracy, x, split.test) for name, x in found.items()},
        chosen_step=max(chosen - 1, 0),  # the first of the path and step 0 are the same
        num_flagged=solution.stats["num_flagged"],
    )


def _best_single(
    problem: bx.Bilevel, x0: PyTree, num_features: int, split: Split
) -> tuple[PyTree, Array]:
    """`x` and theta of the best single strength, from strong to weak."""
    candidates, state = [], None
    for log_strength in LOG_GRID[::-1]:
        theta = jnp.full(num_features, log_strength)
        estimate, state = bx.hypergradient(
            problem, x0, theta, inner_solver=_SOLVER, rule=_RULE, state=state
        )
        candidates.append((_on(loss, estimate.x, split.validation), estimate.x, theta))
    _, x, theta = min(candidates, key=lambda candidate: candidate[0])
    return x, theta


_SOLVER = bx.NewtonCG(rtol=1e-4)
_RULE = bx.Implicit(bx.linear.CG(rtol=1e-2))
_METHOD = bx.DoubleLoop(_SOLVER, _RULE, optax.adam(0.1))


def _on(measure: Any, x: PyTree, part: dict[str, np.ndarray]) -> float:
    return float(measure(x, {name: jnp.asarray(array) for name, array in part.items()}))


def _accuracy(x: PyTree, data: PyTree) -> Array:
    logits = data["features"] @ x["weights"] + x["bias"][None, :]
    return jnp.mean((jnp.argmax(logits, axis=1) == data["labels"]).astype(logits.dtype))
