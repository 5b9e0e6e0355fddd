"""Least squares with a weight per sample, and with more unknowns than equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel
from ._base import Oracle, Reference, cast, cosine_matrix, implicit_reference, numbers


def data_weights(dtype: Any = float) -> Oracle:
    """One weight `sigmoid(theta_i)` per training sample; more outer than inner variables.

    `U = sum_i sigmoid(theta_i) (a_i'x - y_i)^2/2 + 0.05 ||x||^2`,
    `L = ||Ax - y||^2/2` on validation data.
    """
    train = cast((cosine_matrix(12, 4, 0.37, 0.2), np.sin(0.5 * np.arange(12))), dtype)
    validation = cast((cosine_matrix(9, 4, 0.31, 0.45), np.sin(0.5 * np.arange(9) + 0.3)), dtype)
    A, y = numbers(train)
    A_validation, y_validation = numbers(validation)

    def reference(theta: PyTree) -> Reference:
        weight = 1 / (1 + np.exp(-numbers(theta)))
        hessian = (A.T * weight) @ A + 0.1 * np.eye(4)
        x = np.linalg.solve(hessian, A.T @ (weight * y))
        error = A_validation @ x - y_validation
        return implicit_reference(
            x=x,
            value=0.5 * error @ error,
            residual_x=hessian,
            residual_theta=A.T * (weight * (1 - weight) * (A @ x - y)),
            outer_x=A_validation.T @ error,
            outer_theta=0.0,
        )

    return Oracle(
        name="data_weights",
        problem=Bilevel(_weighted_inner, _squared_error, train, validation),
        x0=cast(np.zeros(4), dtype),
        theta=cast(0.2 * np.cos(np.arange(12)), dtype),
        reference=reference,
    )


def _weighted_inner(x: Array, theta: Array, data: PyTree) -> Scalar:
    A, y = data
    return 0.5 * jnp.sum(jax.nn.sigmoid(theta) * (A @ x - y) ** 2) + 0.05 * jnp.sum(x**2)


def _squared_error(x: Array, theta: Array, data: PyTree) -> Scalar:
    del theta
    A, y = data
    return 0.5 * jnp.sum((A @ x - y) ** 2)


def overparameterised(dtype: Any = float) -> Oracle:
    """Three equations for seven unknowns: a singular Hessian and many solutions.

    `U = ||Ax - B theta - c||^2/2`, `L = ||Wx - e||^2/2`. The answers are those of the
    solution of minimum norm, which every gradient method finds from `x0 = 0`: with `+` for
    the pseudo-inverse, `x* = A^+ (B theta + c)`, `v = (A'A)^+ d_x L`. The plain adjoint
    system `A'A v = d_x L` has no solution.
    """
    inner = {
        "A": cosine_matrix(3, 7, 0.41, 0.6),
        "B": cosine_matrix(3, 2, 0.7, 0.1),
        "c": np.array([0.5, -0.2, 0.1]),
    }
    inner = cast(inner, dtype)
    outer = cast((cosine_matrix(5, 7, 0.29, 0.33), np.cos(np.arange(5))), dtype)
    exact = numbers(inner)
    W, e = numbers(outer)
    inverse = np.linalg.pinv(exact["A"])
    response = inverse @ exact["B"]  # D x*
    offset = inverse @ exact["c"]

    def reference(theta: PyTree) -> Reference:
        x = response @ numbers(theta) + offset
        error = W @ x - e
        return Reference(
            x_star=x,
            v_star=inverse @ inverse.T @ (W.T @ error),
            value=np.asarray(0.5 * error @ error),
            hypergradient=response.T @ (W.T @ error),
            jacobian=response,
            hyper_hessian=(W @ response).T @ (W @ response),
        )

    return Oracle(
        name="overparameterised",
        problem=Bilevel(_underdetermined_inner, _squared_error, inner, outer),
        x0=cast(np.zeros(7), dtype),
        theta=cast(np.array([0.4, -0.7]), dtype),
        reference=reference,
        theta_star=np.linalg.lstsq(W @ response, e - W @ offset, rcond=None)[0],
        is_strongly_convex=False,
    )


def _underdetermined_inner(x: Array, theta: Array, data: PyTree) -> Scalar:
    return 0.5 * jnp.sum((data["A"] @ x - data["B"] @ theta - data["c"]) ** 2)
