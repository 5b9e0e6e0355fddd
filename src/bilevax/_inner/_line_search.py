"""The line search that `NewtonCG` and `LBFGS` share: one evaluation per step.

Near a minimum the objective is flat: a step changes `f` by less than rounding does, long
before the gradient is as small as it can get. A search on `f` alone then rejects good
steps and stalls. The gradient is accurate there, so it takes over.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Scalar


def rounding(f: Scalar) -> Scalar:
    """Changes of the objective below this are rounding errors."""
    return 10 * float(jnp.finfo(f.dtype).eps) * jnp.abs(f)


def is_decrease(f: Scalar, new_f: Scalar, slope: Scalar) -> Bool[Array, ""]:
    """Armijo: the objective falls, measurably, by a part of what its slope promised.

    `slope` is the derivative along the step times its length, so negative.
    """
    return (new_f <= f + 1e-4 * slope) & (-slope > rounding(f))


def is_level(f: Scalar, new_f: Scalar) -> Bool[Array, ""]:
    """Whether the objective rose by no more than may be due to rounding in long sums."""
    return new_f <= f + float(jnp.finfo(f.dtype).eps) ** (2 / 3) * jnp.abs(f)


def shrink(slope: Scalar, new_slope: Scalar) -> Scalar:
    """The factor for a rejected step: the secant's zero of the slope, within bounds."""
    rise = new_slope - slope
    factor = jnp.where(rise > 0, -slope / jnp.where(rise > 0, rise, 1), 0.5)
    return jnp.where(jnp.isfinite(factor), jnp.clip(factor, 0.1, 0.5), 0.1)


def is_lost(f: Scalar, slope: Scalar, full_slope: Scalar) -> Bool[Array, ""]:
    """Whether a step has been shortened so far that nothing is to be hoped for.

    Where the whole step promised no measurable decrease of the objective, a few
    rejections say that the gradient is at its floor, too.
    """
    flat = -full_slope <= rounding(f)
    return slope >= jnp.where(flat, 0.05, 1e-10) * full_slope
