"""Inner problems that are equations: their derivative in x has no symmetry."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel, FixedPoint, Root
from ._base import Oracle, Reference, cast, cosine_matrix, implicit_reference, newton, numbers


def scalar_root(dtype: Any = float) -> Oracle:
    """`x^3 = theta`, `L = (x - 1/2)^2/2 + theta^2/20`, without data."""

    def reference(theta: PyTree) -> Reference:
        theta = numbers(theta)
        x = np.cbrt(theta)
        slope = 1 / (3 * x**2)  # D x*
        return Reference(
            x_star=np.asarray(x),
            v_star=np.asarray((x - 0.5) * slope),
            value=np.asarray(0.5 * (x - 0.5) ** 2 + 0.05 * theta**2),
            hypergradient=np.asarray((x - 0.5) * slope + 0.1 * theta),
            jacobian=np.asarray(slope),
            # the second derivative of the cube root is -2/9 theta^(-5/3)
            hyper_hessian=np.asarray(slope**2 - (x - 0.5) * 2 / (9 * x**5) + 0.1),
        )

    return Oracle(
        name="scalar_root",
        problem=Bilevel(Root(_cubic), _cubic_outer),
        x0=cast(np.ones(()), dtype),  # not zero, where the derivative vanishes
        theta=cast(np.asarray(2.0), dtype),
        reference=reference,
        is_strongly_convex=False,
    )


def _cubic(x: Scalar, theta: Scalar) -> Scalar:
    return x**3 - theta


def _cubic_outer(x: Scalar, theta: Scalar) -> Scalar:
    return 0.5 * (x - 0.5) ** 2 + 0.05 * theta**2


def fixed_point(dtype: Any = float) -> Oracle:
    """`x = tanh(Wx + theta)` with a non-symmetric contraction, `L = c'x`."""
    inner = cast(0.3 * cosine_matrix(4, 4, 0.9, 0.5), dtype)
    outer = cast(np.array([1.0, -2.0, 0.5, 1.0]), dtype)
    W, c = numbers(inner), numbers(outer)

    def reference(theta: PyTree) -> Reference:
        theta = numbers(theta)
        x = np.zeros(4)
        for _ in range(200):  # a contraction by less than 0.8: 0.8^200 = 4e-20
            x = np.tanh(W @ x + theta)
        slope = np.diag(1 - x**2)
        return implicit_reference(
            x=x,
            value=c @ x,
            residual_x=np.eye(4) - slope @ W,
            residual_theta=-slope,
            outer_x=c,
            outer_theta=0.0,
        )

    return Oracle(
        name="fixed_point",
        problem=Bilevel(FixedPoint(_layer), _linear_outer, inner, outer),
        x0=cast(np.zeros(4), dtype),
        theta=cast(np.array([0.1, -0.4, 0.2, 0.5]), dtype),
        reference=reference,
        is_strongly_convex=False,
    )


def _layer(x: Array, theta: Array, data: Array) -> Array:
    return jnp.tanh(data @ x + theta)


def _linear_outer(x: Array, theta: Array, data: Array) -> Scalar:
    del theta
    return jnp.vdot(data, x)


def root(dtype: Any = float) -> Oracle:
    """`M z + sin(z)/2 = N theta + q` with `z` the leaves of x; all of it in dictionaries.

    `L = ||z - 1||^2/2 + ||theta||^2/20`.
    """
    data = {
        "M": 3.0 * np.eye(4) + cosine_matrix(4, 4, 0.9, 0.5),
        "N": cosine_matrix(4, 3, 0.7, 0.1),
        "q": np.array([0.4, -0.3, 0.2, 0.6]),
    }
    data = cast(data, dtype)
    exact = numbers(data)

    def reference(theta: PyTree) -> Reference:
        theta = numbers(theta)
        theta = np.concatenate([theta["gain"], theta["shift"][None]])
        z = newton(lambda z: _exact_system(exact, z, theta), np.zeros(4))
        answers = implicit_reference(
            x=z,
            value=0.5 * np.sum((z - 1) ** 2) + 0.05 * theta @ theta,
            residual_x=_exact_system(exact, z, theta)[1],
            residual_theta=-exact["N"],
            outer_x=z - 1,
            outer_theta=0.1 * theta,
        )
        h = answers.hypergradient
        return Reference(
            x_star=_split(z),
            v_star=_split(answers.v_star),
            value=answers.value,
            hypergradient={"gain": h[:2], "shift": h[2]},
        )

    theta = {"gain": np.array([0.5, -0.8]), "shift": np.asarray(0.3)}
    return Oracle(
        name="root",
        problem=Bilevel(Root(_system), _system_outer, data),
        x0=cast(_split(np.zeros(4)), dtype),
        theta=cast(theta, dtype),
        reference=reference,
        is_strongly_convex=False,
    )


def _exact_system(
    exact: dict[str, np.ndarray], z: np.ndarray, theta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The residual and its derivative in z."""
    residual = exact["M"] @ z + 0.5 * np.sin(z) - exact["N"] @ theta - exact["q"]
    return residual, exact["M"] + 0.5 * np.diag(np.cos(z))


def _split(z: Any) -> PyTree:
    return {"state": z[:3], "offset": z[3]}


def _system(x: PyTree, theta: PyTree, data: PyTree) -> PyTree:
    z = jnp.concatenate([x["state"], x["offset"][None]])
    parameters = jnp.concatenate([theta["gain"], theta["shift"][None]])
    return _split(data["M"] @ z + 0.5 * jnp.sin(z) - data["N"] @ parameters - data["q"])


def _system_outer(x: PyTree, theta: PyTree) -> Scalar:
    fit = 0.5 * (jnp.sum((x["state"] - 1) ** 2) + (x["offset"] - 1) ** 2)
    return fit + 0.05 * (jnp.sum(theta["gain"] ** 2) + theta["shift"] ** 2)
