"""Derivatives of a function of one number by differences, with what they are worth."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

# Each step is a quarter of the one before, so that an error of second order falls by 16.
_RATIO = 4.0
_MAX_STEPS = 5
# Sums of many terms are rounded by about this many units in the last place.
_UNITS = 32.0


@dataclasses.dataclass(frozen=True)
class Slope:
    """A central difference.

    `uncertainty` is its change from one step to the next, plus the noise of the function
    divided by the step. `jump` is the difference of the two one-sided differences, at the
    larger and at the smaller step: where the function is smooth it falls with the step.
    """

    value: float
    uncertainty: float
    jump: tuple[float, float]
    step: float
    previous_step: float

    def is_kink(self, size: float) -> bool:
        """Whether the one-sided differences settle on two values, against slopes of `size`.

        Not finite on one side is a kink too: the edge of where the function is defined.
        """
        large, small = self.jump
        if not (np.isfinite(large) and np.isfinite(small)):
            return True
        is_real = small > 0.01 * size + 10 * self.uncertainty
        return bool(is_real and small > 2 / _RATIO * large)


def slope(
    fn: Callable[[float], float], at_zero: float, eps: float, noise: float, size: float
) -> Slope:
    """The derivative at zero of `fn`, computed in a dtype of precision `eps`.

    Its values are rounded, and uncertain by `noise` for other reasons. `size` is a guess of
    the derivative. If one unit of the argument is a change of order one, the error at step
    `s` is about `noise / s + size s^2`: smallest at the cube root of `noise / size`. Where
    the unit is misjudged the first two steps disagree, and smaller ones are tried; the
    pair that agrees best is kept.
    """
    noise += _UNITS * eps * abs(at_zero)
    step = float(np.clip(np.cbrt(noise / size), 1e-5, 0.03)) if size > 0 else 1e-3
    before, best = _difference(fn, at_zero, step), None
    for _ in range(_MAX_STEPS - 1):
        step, previous_step = step / _RATIO, step
        now = _difference(fn, at_zero, step)
        change = abs(now[0] - before[0])
        # The argument is rounded too, which counts where the slope is small and bends.
        rounding = noise / step + _UNITS * eps * now[1] / step
        found = Slope(now[0], change + rounding, (before[1], now[1]), step, previous_step)
        if best is None or not best.uncertainty <= found.uncertainty:
            best = found
        # False also where a value is not finite: a smaller step may stay in the domain.
        if change <= 1e-4 * max(size, abs(now[0])) + rounding:
            break
        before = now
    assert best is not None
    return best


def _difference(fn: Callable[[float], float], at_zero: float, step: float) -> tuple[float, float]:
    """The central difference, and how far the one-sided ones are apart."""
    ahead, behind = fn(step), fn(-step)
    return (ahead - behind) / (2 * step), abs(ahead - 2 * at_zero + behind) / step


def random_direction(like: PyTree[Array], seed: int) -> PyTree[Array]:
    """Numbers without order, the same each time, of the size of the entries of `like`.

    A step of `s` along it changes every entry by `s/2` to `s` relative to its leaf, but at
    least to one: a zero has no size, and a logarithm near zero is no small number.
    """
    generator = np.random.default_rng(seed)

    def leaf(x: Array) -> Array:
        signs = 2.0 * generator.integers(0, 2, x.shape) - 1.0
        sizes = generator.uniform(0.5, 1.0, x.shape)
        return jnp.asarray(unit(x) * signs * sizes, x.dtype)

    return jtu.tree_map(leaf, like)


def unit(x: Array) -> float:
    """What counts as a change of order one in a leaf; see `random_direction`."""
    mean_square = float(jnp.mean(x**2)) if x.size else 0.0
    return max(1.0, float(np.sqrt(mean_square)))


def precision(*trees: PyTree[Array]) -> float:
    """Of the coarsest dtype: arguments are rounded as well as values."""
    leaves = jtu.tree_leaves(trees)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)


def gaussian(like: PyTree[Array], seed: int) -> PyTree[Array]:
    """Normal numbers in the structure of `like`, the same each time: a start for Lanczos."""
    generator = np.random.default_rng(seed)
    return jtu.tree_map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), like)


def relative(difference: Any, size: Any) -> float:
    """`difference / size` for people; zero over zero is zero."""
    difference, size = float(difference), float(size)
    return difference / size if size > 0 else (0.0 if difference == 0 else np.inf)
