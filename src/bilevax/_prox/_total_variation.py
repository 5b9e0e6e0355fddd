"""Total variation along one axis: signals that are constant but for jumps."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._tree import stop_gradient
from ._base import AbstractLeafwise, LeafPiece, Settings, setting


class TotalVariation1D(AbstractLeafwise):
    """`strength sum_i |x_{i+1} - x_i|`, of a vector.

    **Arguments:** `strength`: a number, or a function of theta that returns one. Not negative.

    **Cost** of a proximal step: a loop over the vector, about as long as it is, in sequence.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.TotalVariation1D(lambda theta: jnp.exp(theta))
        ```

    Reference: Condat, "A direct algorithm for 1-D total variation denoising", 2013.
    """

    settings: ClassVar[tuple[str, ...]] = ("strength",)

    strength: PyTree = setting(1.0)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        (strength,) = at
        return strength * jnp.sum(jnp.abs(jnp.diff(x)))

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        (strength,) = at
        threshold = step * strength
        found = _segments(*stop_gradient((z, threshold)))
        # On these segments the step is linear, and is differentiated as such.
        pull = threshold * jnp.diff(found.signs, prepend=0, append=0)
        return jnp.where(threshold > 0, found.mean(z + pull), z)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        (strength,) = at
        threshold = step * strength
        found = _segments(z, threshold)
        x = self.step_of_leaf(z, step, at)
        held = threshold - jnp.abs(jnp.cumsum(z - x)[:-1])
        gaps = jnp.where(found.signs == 0, jnp.abs(held), jnp.abs(jnp.diff(x)))
        is_free = threshold == 0

        def mean(g: Array) -> Array:
            return jnp.where(is_free, g, found.mean(g))

        return LeafPiece(
            place=lambda x, strength: mean(x),
            tangent=lambda x, g: mean(g),
            smooth=lambda x, strength: strength * jnp.sum(found.signs * jnp.diff(x)),
            gap=jnp.where(is_free, jnp.inf, jnp.min(gaps, initial=jnp.inf)),
            num_free=jnp.where(is_free, z.size, found.labels[-1] + 1).astype(jnp.int32),
            tag=jnp.where(is_free, jnp.zeros_like(found.signs), found.signs),
        )

    def _check_shapes(self, leaves: list[Array], columns: list[list[Array]]) -> None:
        for leaf, strength in zip(leaves, columns[0], strict=True):
            if leaf.ndim != 1 or strength.ndim:
                raise ValueError(
                    "bx.prox.TotalVariation1D(strength=...) takes vectors and one strength; got x "
                    f"of shape {leaf.shape} and a strength of shape {strength.shape}."
                )


class _Segments(NamedTuple):
    """Where a vector is constant."""

    labels: Array  # of each entry, from 0 on
    signs: Array  # of each step from an entry to the next: 0 within a segment

    def mean(self, z: Array) -> Array:
        num = self.labels.size
        sums = jax.ops.segment_sum(jnp.stack([z, jnp.ones_like(z)], 1), self.labels, num)
        return (sums[:, 0] / jnp.maximum(sums[:, 1], 1))[self.labels]


class _Walk(NamedTuple):
    """Condat's variables, in his order; `starts` and `values` of the segments that are left."""

    k: Array
    k0: Array
    k_low: Array
    k_high: Array
    v_low: Array
    v_high: Array
    u_low: Array
    u_high: Array
    starts: Array
    values: Array
    is_done: Array


def _segments(z: Array, threshold: Scalar) -> _Segments:
    num = z.size
    if num < 2:
        return _Segments(jnp.zeros(num, jnp.int32), jnp.zeros(max(num - 1, 0), z.dtype))
    zero = jnp.zeros((), jnp.int32)
    first = _Walk(
        k=zero,
        k0=zero,
        k_low=zero,
        k_high=zero,
        v_low=z[0] - threshold,
        v_high=z[0] + threshold,
        u_low=threshold,
        u_high=-threshold,
        starts=jnp.zeros(num, bool),
        values=jnp.zeros_like(z),
        is_done=jnp.array(False),
    )

    def step(w: _Walk) -> _Walk:
        return jax.lax.cond(w.k == num - 1, _at_end, _within, w, z, threshold)

    last = jax.lax.while_loop(lambda w: ~w.is_done & (threshold > 0), step, first)
    start = jax.lax.cummax(jnp.where(last.starts, jnp.arange(num), 0))
    x = last.values[start]
    signs = jnp.sign(jnp.diff(x))
    labels = jnp.cumsum(jnp.concatenate([jnp.zeros(1), jnp.abs(signs)])).astype(jnp.int32)
    return _Segments(labels, signs)


def _within(w: _Walk, z: Array, t: Scalar) -> _Walk:
    """The next entry: a jump down or up before it, or none yet."""
    ahead = z[w.k + 1]
    falls = ahead + w.u_low < w.v_low - t
    rises = ~falls & (ahead + w.u_high > w.v_high + t)
    return jax.lax.switch(_which(falls, rises), (_extend, _fall, _rise), w, z, t)


def _which(falls: Array, rises: Array) -> Array:
    return jnp.where(falls, 1, jnp.where(rises, 2, 0))


def _extend(w: _Walk, z: Array, t: Scalar) -> _Walk:
    k = w.k + 1
    u_low, u_high = w.u_low + z[k] - w.v_low, w.u_high + z[k] - w.v_high
    length = (k - w.k0 + 1).astype(z.dtype)
    is_low, is_high = u_low >= t, u_high <= -t
    return w._replace(
        k=k,
        v_low=jnp.where(is_low, w.v_low + (u_low - t) / length, w.v_low),
        u_low=jnp.where(is_low, t, u_low),
        k_low=jnp.where(is_low, k, w.k_low),
        v_high=jnp.where(is_high, w.v_high + (u_high + t) / length, w.v_high),
        u_high=jnp.where(is_high, -t, u_high),
        k_high=jnp.where(is_high, k, w.k_high),
    )


def _closed(w: _Walk, value: Scalar, k: Array) -> _Walk:
    """A segment from `k0` on is left at `value`; the next begins at `k`."""
    left = w._replace(starts=w.starts.at[w.k0].set(True), values=w.values.at[w.k0].set(value))
    return left._replace(k=k, k0=k)


def _fall(w: _Walk, z: Array, t: Scalar) -> _Walk:
    k = w.k_low + 1
    w = _closed(w, w.v_low, k)
    return w._replace(k_low=k, k_high=k, v_low=z[k], v_high=z[k] + 2 * t, u_low=t, u_high=-t)


def _rise(w: _Walk, z: Array, t: Scalar) -> _Walk:
    k = w.k_high + 1
    w = _closed(w, w.v_high, k)
    return w._replace(k_low=k, k_high=k, v_low=z[k] - 2 * t, v_high=z[k], u_low=t, u_high=-t)


def _at_end(w: _Walk, z: Array, t: Scalar) -> _Walk:
    """No entry is left: a last jump, or the last segment."""
    falls = w.u_low < 0
    rises = ~falls & (w.u_high > 0)
    return jax.lax.switch(_which(falls, rises), (_finish, _fall_at_end, _rise_at_end), w, z, t)


def _finish(w: _Walk, z: Array, t: Scalar) -> _Walk:
    del t
    length = (w.k - w.k0 + 1).astype(z.dtype)
    return _closed(w, w.v_low + w.u_low / length, w.k)._replace(is_done=jnp.array(True))


def _fall_at_end(w: _Walk, z: Array, t: Scalar) -> _Walk:
    k = w.k_low + 1
    w = _closed(w, w.v_low, k)
    return w._replace(k_low=k, v_low=z[k], u_low=t, u_high=z[k] + t - w.v_high)


def _rise_at_end(w: _Walk, z: Array, t: Scalar) -> _Walk:
    k = w.k_high + 1
    w = _closed(w, w.v_high, k)
    return w._replace(k_high=k, v_high=z[k], u_high=-t, u_low=z[k] - t - w.v_low)
