"""Evidence from the way back: how large the adjoint became."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._tree import tree_norm

# A derivative rule returns cotangents and nothing else. So the evidence is a cotangent: a
# `Probe` of zeros, on which no value depends, goes in, and what comes back for it is what
# was seen. Only the part of an adjoint that belongs to x counts: the slots of an optimiser
# (Adam's second moments, say) have scales of their own.


class Probe(NamedTuple):
    """What is seen on the way back. All scalars."""

    end_norm: Array  # of the adjoint after the last step
    sum_of_norms: Array  # of the adjoint where it was tapped
    num_taps: Array
    # of a truncation that chooses its length
    num_back: Array  # steps that were differentiated
    remainder: Array  # norm of what was cut off, extrapolated
    jacobian_error: Array  # relative, of the steps that were taken
    is_growing: Array  # whether that error still grows


# Where steps contract, growth is at most one; momentum and Newton's method far from the
# solution reach a few hundred. Rounding errors grow as well.


def check_growth(max_growth: float | None) -> None:
    """Raise unless `max_growth` is a positive number or `None`."""
    is_number = isinstance(max_growth, int | float) and not isinstance(max_growth, bool)
    if not (max_growth is None or (is_number and max_growth > 0)):
        raise ValueError(
            f"`max_growth` must be a positive number (math.inf for no limit); got {max_growth!r}."
        )


def largest_growth(max_growth: float | None, dtype: Any) -> float:
    """`max_growth`, or what the precision allows: 1e8 in float64, 1e5 in float32."""
    if max_growth is not None:
        return max_growth
    return 1e8 if jnp.finfo(dtype).eps < 1e-10 else 1e5


def new_probe(dtype: Any) -> Probe:
    """Nothing seen yet."""
    return Probe(*[jnp.zeros((), dtype) for _ in Probe._fields])


def tap(x: PyTree[Array], probe: Probe | None) -> PyTree[Array]:
    """`x`; the norm of its adjoint is added to what is seen."""
    return x if probe is None else _tap(x, probe)


def tap_end(x: PyTree[Array], probe: Probe | None) -> PyTree[Array]:
    """`x`, after the last step; the norm of its adjoint is what growth is measured by."""
    return x if probe is None else _tap_end(x, probe)


def add_tap(probe: Probe, adjoint: PyTree[Array]) -> Probe:
    """What is seen, and one adjoint more."""
    norm = tree_norm(adjoint).astype(probe.end_norm.dtype)
    return probe._replace(sum_of_norms=probe.sum_of_norms + norm, num_taps=probe.num_taps + 1)


def growth(probe: Probe) -> Scalar:
    """The mean norm of the adjoint on the way back, relative to that at the end."""
    scale = probe.num_taps * probe.end_norm
    return jnp.where(scale > 0, probe.sum_of_norms / jnp.where(scale > 0, scale, 1), 0)


@jax.custom_vjp
def _tap(x: PyTree, probe: Probe) -> PyTree:
    del probe
    return x


@jax.custom_vjp
def _tap_end(x: PyTree, probe: Probe) -> PyTree:
    del probe
    return x


def _forward(x: PyTree, probe: Probe) -> tuple[PyTree, Probe]:
    return x, probe


def _backward(probe: Probe, adjoint: PyTree) -> tuple[PyTree, Probe]:
    return adjoint, add_tap(new_probe(probe.end_norm.dtype), adjoint)


def _backward_end(probe: Probe, adjoint: PyTree) -> tuple[PyTree, Probe]:
    norm = tree_norm(adjoint).astype(probe.end_norm.dtype)
    return adjoint, new_probe(norm.dtype)._replace(end_norm=norm)


_tap.defvjp(_forward, _backward)
_tap_end.defvjp(_forward, _backward_end)
