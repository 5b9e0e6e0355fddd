"""Quadratic games: every answer, the hyper-Hessian and the optimum in closed form."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Scalar

from .._problem import Bilevel
from ._base import Oracle, Reference, cast, cosine_matrix, implicit_reference, numbers

_SCALAR = {"a": 2.0, "b": 3.0, "c": 1.0, "e": -1.0, "rho": 0.5}


def scalar_game(dtype: Any = float) -> Oracle:
    """`U = a x^2/2 - (b theta + c) x`, `L = (x - e)^2/2 + rho theta^2/2`, without data."""
    a, b, c, e, rho = (_SCALAR[key] for key in ("a", "b", "c", "e", "rho"))

    def reference(theta: PyTree) -> Reference:
        theta = numbers(theta)
        x = (b * theta + c) / a
        return Reference(
            x_star=np.asarray(x),
            v_star=np.asarray((x - e) / a),
            value=np.asarray(0.5 * (x - e) ** 2 + 0.5 * rho * theta**2),
            hypergradient=np.asarray(b / a * (x - e) + rho * theta),
            jacobian=np.asarray(b / a),
            hyper_hessian=np.asarray((b / a) ** 2 + rho),
        )

    return Oracle(
        name="scalar_game",
        problem=Bilevel(_scalar_inner, _scalar_outer),
        x0=cast(np.zeros(()), dtype),
        theta=cast(np.asarray(0.7), dtype),
        reference=reference,
        theta_star=np.asarray(b * (a * e - c) / (b**2 + rho * a**2)),
    )


def _scalar_inner(x: Scalar, theta: Scalar) -> Scalar:
    return 0.5 * _SCALAR["a"] * x**2 - (_SCALAR["b"] * theta + _SCALAR["c"]) * x


def _scalar_outer(x: Scalar, theta: Scalar) -> Scalar:
    return 0.5 * (x - _SCALAR["e"]) ** 2 + 0.5 * _SCALAR["rho"] * theta**2


def quadratic(
    dtype: Any = float, size_x: int = 5, size_theta: int = 3, condition: float = 10.0
) -> Oracle:
    """A quadratic game of any size, the eigenvalues of `A` from 1 to `condition`.

    `U = x'Ax/2 + x'B theta + a'x`,
    `L = x'Cx/2 + x'K theta + theta'D theta/2 + c'x + e'theta`.

    The cross terms `B`, `K` have no symmetry. The quadratic form of `L` is positive
    definite, so that the optimum exists and is unique.
    """
    basis = np.linalg.qr(cosine_matrix(size_x, size_x, 0.9, 0.5))[0]
    eigenvalues = np.logspace(0, np.log10(condition), size_x)
    factor = cosine_matrix(size_x + size_theta, size_x + size_theta, 0.41, 0.6)
    form = factor.T @ factor / factor.shape[0] + 0.1 * np.eye(factor.shape[0])
    inner = {
        "A": (basis * eigenvalues) @ basis.T,
        "B": cosine_matrix(size_x, size_theta, 0.7, 0.1),
        "a": np.sin(1.0 + np.arange(size_x)),
    }
    outer = {
        "C": form[:size_x, :size_x],
        "K": form[:size_x, size_x:],
        "D": form[size_x:, size_x:],
        "c": np.cos(2.0 * np.arange(size_x)),
        "e": np.sin(0.5 + np.arange(size_theta)),
    }
    return _game("quadratic", inner, outer, np.cos(1.0 + np.arange(size_theta)), dtype)


def quadratic_game(dtype: Any = float) -> Oracle:
    """The quadratic game with 2 inner and 3 outer variables, at theta = 0."""
    inner = {
        "A": np.array([[3.0, 1.0], [1.0, 2.0]]),
        "B": np.array([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]]),
        "a": np.array([0.5, -0.3]),
    }
    outer = {
        "C": np.array([[1.0, 0.2], [0.2, 2.0]]),
        "K": np.array([[0.1, 0.0, 0.3], [0.2, -0.1, 0.0]]),
        "D": 0.5 * np.eye(3),
        "c": np.array([1.0, -1.0]),
        "e": np.array([0.1, 0.2, -0.3]),
    }
    return _game("quadratic_game", inner, outer, np.zeros(3), dtype)


def _game(name: str, inner: PyTree, outer: PyTree, theta: np.ndarray, dtype: Any) -> Oracle:
    inner, outer = cast(inner, dtype), cast(outer, dtype)
    exact = {**numbers(inner), **numbers(outer)}

    def reference(theta: PyTree) -> Reference:
        return game_reference(exact, numbers(theta))

    # The value is quadratic in theta: one Newton step from anywhere is its minimiser.
    at_zero = reference(np.zeros_like(theta))
    assert at_zero.hyper_hessian is not None
    return Oracle(
        name=name,
        problem=Bilevel(game_inner, game_outer, inner, outer),
        x0=cast(np.zeros(exact["A"].shape[0]), dtype),
        theta=cast(theta, dtype),
        reference=reference,
        theta_star=-np.linalg.solve(at_zero.hyper_hessian, at_zero.hypergradient),
    )


def game_reference(exact: dict[str, np.ndarray], theta: np.ndarray) -> Reference:
    """The answers of a quadratic game with the matrices `exact`."""
    A, B, C, K, D = (exact[key] for key in "ABCKD")
    x = -np.linalg.solve(A, B @ theta + exact["a"])
    value = 0.5 * x @ C @ x + x @ K @ theta + 0.5 * theta @ D @ theta
    jacobian = -np.linalg.solve(A, B)
    return implicit_reference(
        x=x,
        value=value + exact["c"] @ x + exact["e"] @ theta,
        residual_x=A,
        residual_theta=B,
        outer_x=C @ x + K @ theta + exact["c"],
        outer_theta=K.T @ x + D @ theta + exact["e"],
        hyper_hessian=jacobian.T @ C @ jacobian + jacobian.T @ K + K.T @ jacobian + D,
    )


def game_inner(x: PyTree, theta: PyTree, data: PyTree) -> Scalar:
    """U of the quadratic game."""
    linear = data["B"] @ theta + data["a"]
    return 0.5 * jnp.vdot(x, data["A"] @ x) + jnp.vdot(x, linear)


def game_outer(x: PyTree, theta: PyTree, data: PyTree) -> Scalar:
    """L of the quadratic game."""
    return (
        0.5 * jnp.vdot(x, data["C"] @ x)
        + jnp.vdot(x, data["K"] @ theta)
        + 0.5 * jnp.vdot(theta, data["D"] @ theta)
        + jnp.vdot(data["c"], x)
        + jnp.vdot(data["e"], theta)
    )
