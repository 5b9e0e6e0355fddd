"""Evidence from the way back: how large the adjoint became."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._tree import tree_norm

# A derivative rule returns cotangents and nothing else. So the evidence is a cotangent:
# `probe` is an array of zeros that no value depends on, and what comes back for it is
# (norm of the adjoint at the end, sum of its norms where it was tapped, number of taps).
# Only the part of the adjoint that belongs to x counts: the slots of an optimiser (Adam's
# second moments, say) have scales of their own.


# Where steps contract, growth is at most one; momentum and Newton's method far from the
# solution reach a few hundred.
MAX_GROWTH = 1e6


def check_growth(max_growth: float) -> None:
    """Raise unless `max_growth` is a positive number."""
    is_number = isinstance(max_growth, int | float) and not isinstance(max_growth, bool)
    if not (is_number and max_growth > 0):
        raise ValueError(
            f"`max_growth` must be a positive number (math.inf for no limit); got {max_growth!r}."
        )


def new_probe(dtype: jnp.dtype) -> Array:
    """Nothing seen yet."""
    return jnp.zeros(3, dtype)


def tap(x: PyTree[Array], probe: Array | None) -> PyTree[Array]:
    """`x`; the norm of its adjoint is added to what is seen."""
    return x if probe is None else _tap(x, probe)


def tap_end(x: PyTree[Array], probe: Array | None) -> PyTree[Array]:
    """`x`, after the last step; the norm of its adjoint is what growth is measured by."""
    return x if probe is None else _tap_end(x, probe)


def seen(adjoint: PyTree[Array], dtype: jnp.dtype) -> Array:
    """What one tap adds."""
    norm = tree_norm(adjoint).astype(dtype)
    return jnp.stack([jnp.zeros_like(norm), norm, jnp.ones_like(norm)])


def growth(probe: Array) -> Scalar:
    """The mean norm of the adjoint on the way back, relative to that at the end."""
    end, total, count = probe
    known = (end > 0) & (count > 0)
    return jnp.where(known, total / jnp.where(known, count * end, 1), 0)


@jax.custom_vjp
def _tap(x: PyTree, probe: Array) -> PyTree:
    del probe
    return x


def _tap_forward(x: PyTree, probe: Array) -> tuple[PyTree, Array]:
    return x, probe


def _tap_backward(probe: Array, adjoint: PyTree) -> tuple[PyTree, Array]:
    return adjoint, seen(adjoint, probe.dtype)


_tap.defvjp(_tap_forward, _tap_backward)


@jax.custom_vjp
def _tap_end(x: PyTree, probe: Array) -> PyTree:
    del probe
    return x


def _tap_end_backward(probe: Array, adjoint: PyTree) -> tuple[PyTree, Array]:
    norm = tree_norm(adjoint).astype(probe.dtype)
    return adjoint, jnp.stack([norm, jnp.zeros_like(norm), jnp.zeros_like(norm)])


_tap_end.defvjp(_tap_forward, _tap_end_backward)
