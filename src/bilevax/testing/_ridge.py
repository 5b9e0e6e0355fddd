"""Ridge regression, its strengths learned on validation data."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel, LeastSquares
from ._base import Oracle, Reference, cast, cosine_matrix, implicit_reference, numbers

# Multiples of the golden ratio, and nearly so of the square root of 2, are spread most evenly
# modulo 1: with these frequencies no two of many columns are nearly parallel.
EVEN_FREQUENCIES = (math.pi * (math.sqrt(5) - 1), 2 * math.pi * (math.sqrt(2) - 1))


def ridge(
    dtype: Any = float,
    num_samples: int = 12,
    num_features: int = 4,
    num_validation: int = 9,
    feature_scale_decades: float = 0.0,
    frequencies: tuple[float, float] = (0.37, 0.31),
) -> Oracle:
    """One strength `exp(theta_j)` per feature; `(A, y)` are the data of a level.

    `U = ||Ax - y||^2/2 + sum_j exp(theta_j) x_j^2/2`, `L = ||Ax - y||^2/2` on validation
    data. The scale of the features falls from 1 to `10^-feature_scale_decades`. The two
    `frequencies` are those of `cosine_matrix` for the two `A`. The default ones suit few
    features; with more than about ten take `EVEN_FREQUENCIES`.
    """
    data = _data(
        num_samples, num_features, num_validation, feature_scale_decades, frequencies, dtype
    )
    theta = cast(np.linspace(-1.0, 0.5, num_features), dtype)
    return _oracle("ridge", Bilevel(_inner, _outer, *data), theta, dtype)


def least_squares(dtype: Any = float) -> Oracle:
    """`ridge` as the condition `LeastSquares`: residuals `Ax - y` and `exp(theta/2) x`."""
    inner, outer = _data(12, 4, 9, 0.0, (0.37, 0.31), dtype)
    theta = cast(np.linspace(-1.0, 0.5, 4), dtype)
    problem = Bilevel(LeastSquares(_residuals, inner), _outer, outer_data=outer)
    return _oracle("least_squares", problem, theta, dtype)


def ridge_log_lambda(dtype: Any = float) -> Oracle:
    """One strength `exp(theta)` for all features, theta a scalar."""
    # imported here: SciPy is not needed by any other oracle
    from scipy.optimize import brentq

    theta = cast(np.log(0.3), dtype)
    data = _data(12, 4, 9, 0.0, (0.37, 0.31), dtype)
    oracle = _oracle("ridge_log_lambda", Bilevel(_inner, _outer, *data), theta, dtype)

    def slope(theta: float) -> float:
        return float(oracle.reference(np.asarray(theta)).hypergradient)

    # The slope changes its sign once in [-8, 6].
    theta_star = np.asarray(brentq(slope, -8.0, 6.0, xtol=1e-14))
    return Oracle(
        oracle.name, oracle.problem, oracle.x0, oracle.theta, oracle.reference, theta_star
    )


def _data(
    num_samples: int,
    num_features: int,
    num_validation: int,
    feature_scale_decades: float,
    frequencies: tuple[float, float],
    dtype: Any,
) -> tuple[PyTree, PyTree]:
    scale = np.logspace(0.0, -feature_scale_decades, num_features)
    train = (
        cosine_matrix(num_samples, num_features, frequencies[0], 0.2) * scale,
        np.sin(0.5 * np.arange(num_samples)),
    )
    validation = (
        cosine_matrix(num_validation, num_features, frequencies[1], 0.45) * scale,
        np.sin(0.5 * np.arange(num_validation) + 0.3),
    )
    return cast(train, dtype), cast(validation, dtype)


def _oracle(name: str, problem: Bilevel, theta: Array, dtype: Any) -> Oracle:
    A, y = numbers(problem.inner_data)
    A_validation, y_validation = numbers(problem.outer_data)

    def reference(theta: PyTree) -> Reference:
        strength = np.exp(numbers(theta))
        hessian = A.T @ A + strength * np.eye(A.shape[1])
        x = np.linalg.solve(hessian, A.T @ y)
        error = A_validation @ x - y_validation
        per_feature = strength * x  # d/dtheta of strength * x, entry by entry
        return implicit_reference(
            x=x,
            value=0.5 * error @ error,
            residual_x=hessian,
            residual_theta=per_feature if strength.ndim == 0 else np.diag(per_feature),
            outer_x=A_validation.T @ error,
            outer_theta=0.0,
        )

    return Oracle(name, problem, cast(np.zeros(A.shape[1]), dtype), theta, reference)


def _inner(x: Array, theta: Array, data: PyTree) -> Scalar:
    A, y = data
    return 0.5 * jnp.sum((A @ x - y) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def _residuals(x: Array, theta: Array, data: PyTree) -> PyTree:
    A, y = data
    return {"fit": A @ x - y, "penalty": jnp.exp(0.5 * theta) * x}


def _outer(x: Array, theta: Array, data: PyTree) -> Scalar:
    del theta
    A, y = data
    return 0.5 * jnp.sum((A @ x - y) ** 2)
