"""Checks of arguments, and a norm, that the linear solvers share."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._tree import tree_dtype


def check_tolerance(name: str, **tolerances: float | Array | None) -> None:
    """Raise unless every tolerance is `None`, traced, or a number that is not negative."""
    for key, value in tolerances.items():
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}({key}=...) must not be negative; got {value}.")


def check_count(name: str, **counts: int | None) -> None:
    """Raise unless every count is `None` or a positive integer."""
    for key, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}({key}=...) must be a positive integer; got {value!r}.")


def largest_entry(a: PyTree[Array]) -> Scalar:
    """The largest magnitude in a pytree, zero for an empty one; NaN if there is one."""
    leaves = [jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(a)]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros((), tree_dtype(a))
