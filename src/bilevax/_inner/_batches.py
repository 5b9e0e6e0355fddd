"""Minibatches inside the steps: regenerated from the step counter, never stored."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._problem import AbstractCondition
from .._tree import is_traced

# After r rounds an index has been left out of every swap with probability 2^-r.
_NUM_ROUNDS = 64


class Minibatches(eqx.Module):
    """Random minibatches of the inner data, each example once in an epoch.

    For `Descent(..., batches=...)`. An epoch has `num_examples // size` steps, which walk
    through a fresh random permutation of the examples; what is left over if `size` does
    not divide `num_examples` is left out of this epoch. The permutation is a function of
    the key and the number of the epoch, evaluated for the indices of the batch alone.

    **Arguments:**

    - `size`: the number of examples in a batch.
    - `key`: a random key, `jax.random.key(0)` say. There is no default.

    `indices(step, num_examples)` are those of the batch at a step, to repeat a run
    elsewhere; called with `(step, data)` it gives the batch itself.

    **Cost:** 64 rounds of integer arithmetic on `size` indices, about what drawing them
    with replacement costs; no memory.

    !!! example

        ```python
        import bilevax as bx, jax, optax

        batches = bx.Minibatches(128, key=jax.random.key(0))
        inner_solver = bx.Descent(optax.adam(1e-3), num_steps=1_000, batches=batches)
        batches.indices(step=0, num_examples=50_000)
        ```

    Reference: Hoang, Morris, Rogaway, "An enciphering scheme based on a card shuffle",
    2012, figure 1 (the swap-or-not shuffle).
    """

    size: int
    key: Array

    def __init__(self, size: int, *, key: Array) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`size` must be an integer of at least 1; got {size!r}.")
        check_key(key)
        self.size = size
        self.key = key

    def indices(self, step: Int[Array, ""] | int, num_examples: int) -> Array:
        """Which examples are in the batch at `step`."""
        if self.size > num_examples:
            raise ValueError(
                f"Minibatches(size={self.size}) is larger than the data: their leading axis has "
                f"length {num_examples}."
            )
        num_batches = num_examples // self.size
        epoch, batch = jnp.divmod(jnp.asarray(step, jnp.int32), num_batches)
        places = batch * self.size + jnp.arange(self.size, dtype=jnp.int32)
        shuffled = _shuffle(jax.random.fold_in(self.key, epoch), places, num_examples)
        return shuffled.astype(jnp.int32)

    def __call__(self, step: Int[Array, ""], data: PyTree) -> PyTree:
        return _take(data, self.indices(step, num_examples(data)))


def _shuffle(key: Array, places: Array, length: int) -> Array:
    """Where a random permutation of `range(length)` sends `places`.

    A round pairs each index `i` with `pivot - i` modulo `length`, for a random pivot, and
    swaps the two members of a pair or not by a random bit that both see.
    """
    rounds = jax.random.bits(key, (_NUM_ROUNDS, 2), jnp.uint32)
    modulus = jnp.uint32(length)

    def swap_or_not(index: Array, bits: Array) -> tuple[Array, None]:
        pivot = bits[0] % modulus
        partner = pivot + jnp.where(index > pivot, modulus, jnp.uint32(0)) - index
        swap = _mix(jnp.maximum(index, partner) ^ bits[1]) >> 31 == 1
        return jnp.where(swap, partner, index), None

    return jax.lax.scan(swap_or_not, places.astype(jnp.uint32), rounds)[0]


def _mix(bits: Array) -> Array:
    """A hash of 32 bits: every bit of the result depends on every bit of the argument."""
    # Shifts and odd multipliers found by search: Wellons, "Hash function prospector", 2018.
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


class _IndexTable(eqx.Module):
    """Row `k mod num_batches` of the user's table of indices at step `k`."""

    table: Array
    largest: int | None  # None if the table is traced: then its values are not known

    def __call__(self, step: Int[Array, ""], data: PyTree) -> PyTree:
        return _take(data, self.table[step % self.table.shape[0]])


def as_batches(batches: Any) -> Callable[[Array, PyTree], PyTree] | None:
    """What the user gave as `batches`, as a function `(step, data) -> data`."""
    if batches is None or isinstance(batches, Minibatches | _IndexTable):
        return batches
    if hasattr(batches, "shape") and hasattr(batches, "dtype"):
        return _as_table(batches)
    if callable(batches):
        return batches
    raise TypeError(
        "`batches` must be bx.Minibatches(size, key=...), an integer array of indices of shape "
        "(num_batches, batch_size) or a function (step, data) -> data; got "
        f"{_describe_leaf(batches)}."
    )


def _as_table(table: Any) -> _IndexTable:
    is_table = len(table.shape) == 2 and jnp.issubdtype(table.dtype, jnp.integer)
    if not is_table or 0 in table.shape:
        raise ValueError(
            "`batches`, as an array, must hold integer indices and have shape (num_batches, "
            f"batch_size), neither of them 0; got {_describe_leaf(table)}."
        )
    if is_traced(table):
        return _IndexTable(jnp.asarray(table, jnp.int32), None)
    smallest, largest = int(table.min()), int(table.max())
    if smallest < 0:
        raise ValueError(f"An index in `batches` is negative: {smallest}.")
    return _IndexTable(jnp.asarray(table, jnp.int32), largest)


def check_batches(batches: Any, condition: AbstractCondition, x0: PyTree) -> PyTree:
    """Raise unless the inner data have these batches. Returns `x0`.

    Indices whose values are not known yet cannot raise. Where one of them is out of range,
    JAX would silently read another example: `x0` then is NaN, which is flagged.
    """
    if condition.data is None:
        raise ValueError(
            "`batches` was given, but the inner problem has no data to take them from: state it "
            "as bx.Bilevel(inner, outer, inner_data=...) or bx.Minimum(fn, data)."
        )
    if isinstance(batches, Minibatches):
        batches.indices(0, num_examples(condition.data))
    if not isinstance(batches, _IndexTable):
        return x0
    length = num_examples(condition.data)
    if batches.largest is not None:
        if batches.largest >= length:
            raise ValueError(
                f"An index in `batches` is out of range: {batches.largest}, and the leading axis "
                f"of the inner data has length {length}."
            )
        return x0
    in_range = jnp.all((batches.table >= 0) & (batches.table < length))
    return jtu.tree_map(lambda a: jnp.where(in_range, a, jnp.nan), x0)


def num_examples(data: PyTree) -> int:
    """The length of the leading axis that all arrays of `data` share."""
    leaves = [(k, a) for k, a in jtu.tree_leaves_with_path(data) if eqx.is_array(a)]
    lengths = {a.shape[0] if a.ndim else None for _, a in leaves}
    if len(lengths) != 1 or None in lengths:
        got = ", ".join(f"inner_data{jtu.keystr(k)} {a.shape}" for k, a in leaves) or "no arrays"
        raise ValueError(
            "`batches` takes examples along the leading axis, which all arrays of the inner data "
            f"must share; got {got}. Give `batches` as a function (step, data) -> data, or keep "
            "what does not belong to the examples out of the data."
        )
    return lengths.pop()  # type: ignore[return-value]


def _take(data: PyTree, indices: Array) -> PyTree:
    return jtu.tree_map(lambda a: a[indices] if eqx.is_array(a) else a, data)


def check_key(key: Any) -> None:
    """Raise unless `key` is one random key, of the new kind or the old."""
    is_new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_old = isinstance(key, jax.Array) and key.dtype == jnp.uint32
    if not ((is_new and key.shape == ()) or (is_old and key.shape == (2,))):
        raise TypeError(
            f"`key` must be one random key such as jax.random.key(0); got {_describe_leaf(key)}."
        )


def _describe_leaf(a: Any) -> str:
    if hasattr(a, "shape") and hasattr(a, "dtype"):
        return f"an array of dtype {a.dtype} and shape {tuple(a.shape)}"
    return f"{a!r} of type {type(a).__name__}"
