"""What accuracy a user asked an inner solver for, in so many words."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from .._tree import default_rtol, working_dtype
from ._base import AbstractInnerSolver
from ._measured import AbstractMeasuredMinimiser


class Asked(NamedTuple):
    """Relative and absolute accuracy of the residual."""

    rtol: Scalar
    atol: Scalar


def asked_of(solver: Any, x: PyTree) -> Asked:
    """The loosest of what was said, at least the default `rtol`.

    The `atol` that other libraries want to be given says nothing.
    """
    dtype = working_dtype(x)
    rtol, atol = jnp.asarray(default_rtol(x), dtype), jnp.zeros((), dtype)
    for part in (solver, getattr(solver, "solver", None)):
        rtol = jnp.maximum(rtol, jnp.asarray(_number(part, "rtol"), dtype))
        if isinstance(part, AbstractInnerSolver | AbstractMeasuredMinimiser):
            atol = jnp.maximum(atol, jnp.asarray(_number(part, "atol"), dtype))
    return Asked(rtol, atol)


def _number(solver: Any, name: str) -> Any:
    number = getattr(solver, name, None)
    return 0.0 if number is None else number
