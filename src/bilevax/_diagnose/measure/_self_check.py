"""Whether the derivatives of the user's functions are those of their values."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._problem import Bilevel
from ..._tree import tree_dtype, tree_norm, tree_scale, tree_zeros_like
from ._differences import gaussian, precision, random_direction, slope
from ._measurements import AtPoint, probe

_Values = Callable[[float], tuple[np.ndarray, np.ndarray]]

_NAMES = ("outer objective", "inner residual", "inner objective")


def self_check(problem: Bilevel, x: PyTree, theta: PyTree, here: AtPoint) -> tuple[str, str]:
    """Where one-sided differences disagree, and where the derivative is wrong, if anywhere.

    The outer objective, the inner objective and the inner residual, projected on a random
    direction, are differenced along one random direction in x and one in theta, and
    compared with what JAX says.
    """
    if not bool(here.is_finite):
        return "", ""
    weights = gaussian(x, 3)
    weights = tree_scale(1 / jnp.maximum(tree_norm(weights), 1e-30), weights)
    zero_x, zero_theta = tree_zeros_like(x), tree_zeros_like(theta)
    eps = precision(x, theta)
    kink = wrong = ""
    for place, dx, dtheta in (
        ("x", random_direction(x, 1), zero_theta),
        ("theta", zero_x, random_direction(theta, 2)),
    ):
        values_at = _remembered(problem, x, theta, dx, dtheta, weights)
        values, derivatives = values_at(0.0)
        for k, name in enumerate(_NAMES[: len(values)]):
            # A residual is a difference of terms of the size of its scale.
            noise = 32 * eps * float(here.scale) if k == 1 else 0.0
            values_of = partial(_entry, values_at, k)
            found = slope(values_of, values[k], eps, noise, abs(derivatives[k]))
            size = max(abs(found.value), abs(derivatives[k]))
            if not kink and found.is_kink(size):
                kink = f"{name} along {place}"
            is_off = abs(found.value - derivatives[k]) > 0.01 * size + 10 * found.uncertainty
            if not wrong and is_off:
                wrong = f"{name} along {place}"
    return kink, wrong


def _remembered(
    problem: Bilevel, x: PyTree, theta: PyTree, dx: PyTree, dtheta: PyTree, weights: PyTree
) -> _Values:
    """`probe` as a function of one number; the functions share their steps."""
    known: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def values_at(t: float) -> tuple[np.ndarray, np.ndarray]:
        if t not in known:
            step = jnp.asarray(t, tree_dtype(x))
            values, derivatives = probe(problem, x, theta, dx, dtheta, weights, step)
            known[t] = np.asarray(values, np.float64), np.asarray(derivatives, np.float64)
        return known[t]

    return values_at


def _entry(values_at: _Values, k: int, t: float) -> float:
    return float(values_at(t)[0][k])
