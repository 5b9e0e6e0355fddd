"""A problem that only unrolling can differentiate: theta is the step size."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel
from ._base import cast, numbers


class UnrolledOracle(eqx.Module):
    """The exact answers after `num_steps` gradient steps with `learning_rate` from `x0`.

    They depend on the algorithm: `value` is `L(x_K(theta), theta)` and `hypergradient` its
    derivative through the steps. At the solution itself the hypergradient is
    `implicit_hypergradient`.
    """

    name: str
    problem: Bilevel
    x0: PyTree
    theta: PyTree
    num_steps: int
    learning_rate: float
    x: np.ndarray  # after num_steps
    value: np.ndarray
    hypergradient: np.ndarray
    implicit_hypergradient: np.ndarray


def learned_step_size(dtype: Any = float, num_steps: int = 10) -> UnrolledOracle:
    """Gradient descent with rate 1 on `theta U` is gradient descent with rate theta on U.

    `U = sum_j s_j (x_j - t_j)^2/2` has a solution that does not depend on theta, so every
    implicit rule gives zero; `x_K - t = (1 - theta s)^K (x0 - t)` does depend on it.
    """
    scale, target = np.array([0.1, 0.5, 1.0]), np.array([1.0, -1.0, 2.0])
    inner = cast({"scale": scale, "target": target}, dtype)
    outer = cast(np.array([0.8, -0.9, 1.7]), dtype)
    theta = cast(np.asarray(0.8), dtype)
    exact, wanted, rate = numbers(inner), numbers(outer), numbers(theta)
    scale, target = exact["scale"], exact["target"]
    decay = 1 - rate * scale
    x = target + decay**num_steps * (0.0 - target)
    slope = -num_steps * scale * decay ** (num_steps - 1) * (0.0 - target)
    return UnrolledOracle(
        name="learned_step_size",
        problem=Bilevel(_inner, _outer, inner, outer),
        x0=cast(np.zeros(3), dtype),
        theta=theta,
        num_steps=num_steps,
        learning_rate=1.0,
        x=x,
        value=np.asarray(0.5 * np.sum((x - wanted) ** 2)),
        hypergradient=np.asarray((x - wanted) @ slope),
        implicit_hypergradient=np.zeros(()),
    )


def _inner(x: Array, theta: Scalar, data: PyTree) -> Scalar:
    return 0.5 * theta * jnp.sum(data["scale"] * (x - data["target"]) ** 2)


def _outer(x: Array, theta: Scalar, data: Array) -> Scalar:
    del theta
    return 0.5 * jnp.sum((x - data) ** 2)
