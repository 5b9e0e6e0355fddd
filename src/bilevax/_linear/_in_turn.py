"""Factorisations under `vmap` on a CPU, so few at once that they do not wait for each other.

jaxlib splits a batch of factorisations that is large enough among the threads of XLA's
pool, and waits for them in a thread of the same pool. Where a program runs as many such
batches side by side as there are threads, all of them wait forever: two of one
200 by 200 matrix more than one are enough on two cores (jaxlib 0.10.2).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._tree import tree_astype, tree_dtype, working_dtype

# A batch of fewer operations stays in one thread.
_SPLIT = 200_000
# No factorisation of a matrix of n rows takes more than this many times n^3.
_OPERATIONS = 30


def in_turn(fn: Callable[..., PyTree[Array]], num_rows: int) -> Callable[..., PyTree[Array]]:
    """`fn`, of arrays, which factorises matrices of `num_rows` rows, for use under `vmap`.

    On a CPU large matrices come one after the other, small ones a few at a time. So a
    condition inside `fn` decides for each what is computed, where `vmap` computes both
    branches. Derivatives are those of `fn` as it is.
    """
    return _in_turn(fn, _OPERATIONS * num_rows**3)


def factorise(fn: Callable, *matrices: Array) -> Any:
    """`fn(*matrices)` in the dtype for factorisations, and back in theirs; a batch in turn."""

    def in_work(*matrices: Array) -> Any:
        found = fn(*tree_astype(matrices, working_dtype(matrices)))
        numbers, others = eqx.partition(found, eqx.is_inexact_array)  # pivots are integers
        return eqx.combine(tree_astype(numbers, tree_dtype(matrices)), others)

    return in_turn(in_work, max(max(matrix.shape) for matrix in matrices))(*matrices)


def _in_turn(fn: Callable[..., PyTree[Array]], cost: int) -> Callable[..., PyTree[Array]]:
    mapped = jax.custom_batching.custom_vmap(fn)

    @mapped.def_vmap
    def _batch(axis_size: int, is_batched: list[bool], *args: Array) -> tuple[PyTree, PyTree]:
        axes = tuple(0 if b else None for b in is_batched)
        at_once = max(1, (_SPLIT - 1) // max(cost, 1))
        together = jax.vmap(fn, axes)
        if axis_size <= at_once:
            out = _in_turn(together, axis_size * cost)(*args)
            return out, jax.tree.map(lambda _: True, out)

        def one_by_one(*args: Array) -> PyTree[Array]:
            rows = [a for a, b in zip(args, is_batched, strict=True) if b]

            def one(rows: list[Array]) -> PyTree[Array]:
                left = iter(rows)
                pairs = zip(args, is_batched, strict=True)
                return _in_turn(fn, cost)(*(next(left) if b else a for a, b in pairs))

            return jax.lax.map(one, rows, batch_size=at_once if at_once > 1 else None)

        out = jax.lax.platform_dependent(*args, cpu=one_by_one, default=together)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def call(*args: Array) -> PyTree[Array]:
        return mapped(*args)

    @call.defjvp
    def _derivative(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        return jax.jvp(fn, primals, tangents)

    return call
