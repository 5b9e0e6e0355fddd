"""Logistic regression with one l2 strength per feature."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel
from ._base import Oracle, Reference, cast, implicit_reference, newton, numbers, tone_matrix


def logistic(
    dtype: Any = float, num_samples: int = 40, num_features: int = 6, num_validation: int = 30
) -> Oracle:
    """Labels -1 and 1, `(A, y)` the data of a level.

    `U = mean log(1 + exp(-y a'x)) + sum_j exp(theta_j) x_j^2/2`,
    `L = mean log(1 + exp(-y a'x)) + 0.01 ||theta||^2` on validation data.
    """
    train = (
        tone_matrix(num_samples, num_features, 0.7, 0.3),
        np.sign(np.sin(1.3 * np.arange(num_samples) + 0.5) + 0.2),
    )
    validation = (
        tone_matrix(num_validation, num_features, 0.9, 0.1),
        np.sign(np.sin(0.8 * np.arange(num_validation) + 0.1) + 0.1),
    )
    train, validation = cast(train, dtype), cast(validation, dtype)
    A, y = numbers(train)
    A_validation, y_validation = numbers(validation)

    def reference(theta: PyTree) -> Reference:
        theta = numbers(theta)
        strength = np.exp(theta)
        x = newton(lambda x: _stationarity(A, y, x, strength), np.zeros(num_features))
        value, gradient, _ = _loss(A_validation, y_validation, x)
        return implicit_reference(
            x=x,
            value=value + 0.01 * theta @ theta,
            residual_x=_stationarity(A, y, x, strength)[1],
            residual_theta=np.diag(strength * x),
            outer_x=gradient,
            outer_theta=0.02 * theta,
        )

    return Oracle(
        name="logistic",
        problem=Bilevel(_inner, _outer, train, validation),
        x0=cast(np.zeros(num_features), dtype),
        theta=cast(np.linspace(-3.0, -1.0, num_features), dtype),
        reference=reference,
    )


def _stationarity(
    A: np.ndarray, y: np.ndarray, x: np.ndarray, strength: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the Hessian of U."""
    _, gradient, hessian = _loss(A, y, x)
    return gradient + strength * x, hessian + np.diag(strength)


def _loss(A: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean logistic loss, its gradient and its Hessian."""
    margin = y * (A @ x)
    miss = 1 / (1 + np.exp(margin))  # probability given to the wrong label
    hessian = (A.T * (miss * (1 - miss))) @ A / len(y)
    return float(np.mean(np.logaddexp(0, -margin))), -A.T @ (y * miss) / len(y), hessian


def _inner(x: Array, theta: Array, data: PyTree) -> Scalar:
    return _mean_loss(x, data) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def _outer(x: Array, theta: Array, data: PyTree) -> Scalar:
    return _mean_loss(x, data) + 0.01 * jnp.sum(theta**2)


def _mean_loss(x: Array, data: PyTree) -> Scalar:
    A, y = data
    return jnp.mean(jnp.logaddexp(0.0, -y * (A @ x)))
