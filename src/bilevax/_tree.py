"""Pytree arithmetic and JAX plumbing used in two places or more."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, PyTree, Scalar


def tree_dot(a: PyTree, b: PyTree) -> Scalar:
    """Inner product of two pytrees of arrays."""
    # Not jnp.vdot: it ravels, which moves sharded arrays about.
    products = [jnp.sum(x * y) for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)]
    return sum(products[1:], products[0]) if products else jnp.zeros(())


def tree_norm(a: PyTree) -> Scalar:
    """Two-norm of a pytree of arrays; zero for a pytree without leaves."""
    return jnp.sqrt(tree_dot(a, a))


def tree_axpy(scale: Array | float, a: PyTree, b: PyTree) -> PyTree:
    """`scale * a + b`, leaf by leaf, in the dtype of `b`."""
    return jtu.tree_map(lambda x, y: jnp.asarray(scale, y.dtype) * x + y, a, b)


def tree_sub(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`, leaf by leaf."""
    return jtu.tree_map(jnp.subtract, a, b)


def tree_scale(scale: Array | float, a: PyTree) -> PyTree:
    """`scale * a`, leaf by leaf."""
    return jtu.tree_map(lambda x: jnp.asarray(scale, x.dtype) * x, a)


def tree_zeros_like(a: PyTree) -> PyTree:
    """Zeros in the structure of `a`."""
    return jtu.tree_map(jnp.zeros_like, a)


def tree_where(pred: Bool[Array, ""], a: PyTree, b: PyTree) -> PyTree:
    """`a` if `pred` else `b`, for two pytrees of arrays of one structure."""
    return jtu.tree_map(lambda x, y: jnp.where(pred, x, y), a, b)


def where_needed(
    is_needed: Bool[Array, ""], compute: Callable[[], PyTree], otherwise: PyTree
) -> PyTree:
    """`compute()` if needed, else `otherwise`, arrays of the same types.

    Unlike `jax.lax.cond` it costs nothing in a batch in which nobody needs it.
    """

    def body(carry: tuple) -> tuple:
        del carry
        return jnp.array(False), compute()

    return jax.lax.while_loop(lambda carry: carry[0], body, (is_needed, otherwise))[1]


def tree_jump(fn: Callable[[PyTree], PyTree], x: PyTree, d: PyTree) -> Scalar:
    """`||g(x + d) - g(x - d) - 2 g'(x) d||`: of third order in `d`, unless g jumps there."""
    product = jax.jvp(fn, (x,), (d,))[1]
    both = jax.lax.map(fn, jtu.tree_map(lambda a, s: jnp.stack([a + s, a - s]), x, d))
    change = jtu.tree_map(lambda g: g[0] - g[1], both)
    return tree_norm(tree_axpy(-2.0, product, change))


def tree_all_finite(a: PyTree) -> Bool[Array, ""]:
    """Whether every entry of every floating-point leaf is finite."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(a) if eqx.is_inexact_array(x)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def tree_larger(a: PyTree, b: PyTree) -> PyTree:
    """Entry by entry, whichever of `a` and `b` is larger in magnitude."""
    return jtu.tree_map(lambda x, y: jnp.where(jnp.abs(x) >= jnp.abs(y), x, y), a, b)


def tree_size(a: PyTree) -> int:
    """Number of entries."""
    return sum(x.size for x in jtu.tree_leaves(a))


def tree_dtype(a: PyTree) -> Any:
    """The common floating dtype of the leaves (JAX's default for none)."""
    leaves = jtu.tree_leaves(a)
    return jnp.result_type(*leaves) if leaves else jnp.zeros(()).dtype


def working_dtype(a: PyTree) -> Any:
    """The dtype for factorisations: that of `a`, but there are none in half precision."""
    dtype = tree_dtype(a)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def tree_astype(a: PyTree, dtype: Any) -> PyTree:
    """`a` with every leaf in `dtype`."""
    return jtu.tree_map(lambda x: x.astype(dtype), a)


def tree_basis(tree: PyTree) -> PyTree:
    """The unit vectors of the space of `tree`, stacked along a new first axis."""
    leaves, structure = jtu.tree_flatten(tree)
    size, basis, begin = tree_size(tree), [], 0
    for leaf in leaves:
        block = jnp.eye(size, leaf.size, -begin, dtype=leaf.dtype)
        basis.append(block.reshape((size, *leaf.shape)))
        begin += leaf.size
    return jtu.tree_unflatten(structure, basis)


def flat_to_tree(flat: Array, like: PyTree) -> PyTree:
    """The last axis of `flat`, which runs over all entries of `like`, as the leaves of `like`."""
    leaves, structure = jtu.tree_flatten(like)
    parts, begin = [], 0
    for leaf in leaves:
        part = flat[..., begin : begin + leaf.size]
        parts.append(part.reshape(flat.shape[:-1] + leaf.shape))
        begin += leaf.size
    return jtu.tree_unflatten(structure, parts)


def tree_to_flat(tree: PyTree) -> Array:
    """All entries in one vector. Moves sharded arrays about: for small dense work only."""
    return jnp.concatenate([x.reshape(-1) for x in jtu.tree_leaves(tree)])


def dense_columns(matvec: Callable[[PyTree], PyTree], like: PyTree) -> Array:
    """The matrix of `matvec`, transposed: row `i` is `A e_i`. As many products as entries."""
    columns = jtu.tree_leaves(map_rows(matvec, tree_basis(like)))
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in columns], axis=1)


def map_rows(
    fn: Callable[[PyTree], PyTree],
    rows: PyTree,
    product: Callable[[PyTree], PyTree] | None = None,
    like: PyTree = None,
    batch_size: int | None = None,
) -> PyTree:
    """`jax.vmap(fn)(rows)`, or in batches; one after the other with a Fourier transform in it.

    XLA's compiler for CPUs may lay out a batch of transforms with its columns first, as a
    factorisation would like them, and then refuses to run what it has chosen
    (https://github.com/jax-ml/jax/issues/22484). Where the work of `fn` is products,
    `product`, of something like `like`, they are looked into instead: that is quicker.
    """
    if product is None:
        like = jtu.tree_map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows)
        product = fn = _traced(fn, like)  # once for both
    if has_fourier_transform(product, like):
        return jax.lax.map(fn, rows)
    return (
        jax.vmap(fn)(rows) if batch_size is None else jax.lax.map(fn, rows, batch_size=batch_size)
    )


def closure_convert(fn: Callable, *example: PyTree) -> Any:
    """`fn`, traced, with what it closes over as leaves: Equinox' closure conversion.

    As of JAX 0.12 a program holds its constants, traced ones too, which would outlive their
    trace with it: they are leaves already.
    """

    def bare(leaf: Any) -> Any:
        is_holding = _is_jaxpr(leaf) and hasattr(leaf, "with_consts")
        return leaf.with_consts([None] * leaf.num_consts) if is_holding else leaf

    return jtu.tree_map(bare, eqx.filter_closure_convert(fn, *example))


def _traced(fn: Callable[[PyTree], PyTree], like: PyTree) -> Callable[[PyTree], PyTree]:
    # Equinox' closure conversion compares types, and in `jax.shard_map` a row has another one.
    program, out = jax.make_jaxpr(fn, return_shape=True)(like)
    call, structure = jaxpr_as_fun(program), jtu.tree_structure(out)
    return lambda row: jtu.tree_unflatten(structure, call(*jtu.tree_leaves(row)))


def has_fourier_transform(fn: Callable[[PyTree], PyTree], like: PyTree) -> bool:
    """Whether there is one in `fn`, or in what it calls, on something like `like`."""

    def is_in(jaxpr: Any) -> bool:
        for equation in jaxpr.eqns:
            values = jtu.tree_leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr)
            if equation.primitive.name == "fft" or any(is_in(v) for v in values if _is_jaxpr(v)):
                return True
        return False

    return is_in(jax.make_jaxpr(fn)(like))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def unbounded(like: Array) -> Array:
    """Larger than any number, in the shape and dtype of `like`.

    Infinity; where `jax_debug_infs` forbids that, the largest number of the dtype.
    """
    _, is_forbidden = debugged()
    return jnp.full_like(like, jnp.finfo(like.dtype).max if is_forbidden else jnp.inf)


def debugged() -> tuple[bool, bool]:
    """Whether JAX is to raise where a NaN, and where an infinity, is made."""
    config: Any = jax.config
    return config.jax_debug_nans, config.jax_debug_infs


def is_bounded(a: Array) -> Bool[Array, "..."]:
    """Whether `a` is a number that is not `unbounded`; false for NaN."""
    return jnp.abs(a) < jnp.finfo(a.dtype).max


def default_rtol(a: PyTree) -> float:
    """The documented default of every relative tolerance: 1e-6, or 1e-4 below float64."""
    return 1e-6 if tree_dtype(a) == jnp.float64 else 1e-4


def strong(a: PyTree) -> PyTree:
    """Strip weak types: a weak and a strong array of one dtype would compile twice."""

    def strip(x: Any) -> Any:
        if not eqx.is_array(x) or not getattr(x, "weak_type", True):
            return x
        return jax.lax.convert_element_type(x, x.dtype)

    return jtu.tree_map(strip, a)


def stop_gradient(tree: PyTree) -> PyTree:
    """`jax.lax.stop_gradient` on the arrays of any pytree."""
    return jtu.tree_map(lambda a: jax.lax.stop_gradient(a) if eqx.is_array(a) else a, tree)


def lax_while_loop(
    cond_fun: Callable, body_fun: Callable, init_val: PyTree, *, max_steps: int | None = None
) -> PyTree:
    """The `while_loop` that Optimistix hands to its solvers, not differentiable backwards."""
    return eqxi.while_loop(cond_fun, body_fun, init_val, max_steps=max_steps, kind="lax")


def checkpointed_while_loop(
    cond_fun: Callable,
    body_fun: Callable,
    init_val: PyTree,
    *,
    max_steps: int | None = None,
    checkpoints: int | None = None,
) -> PyTree:
    """A `while_loop` that can be differentiated backwards, keeping `checkpoints` carries."""
    return eqxi.while_loop(
        cond_fun,
        body_fun,
        init_val,
        max_steps=max_steps,
        kind="checkpointed",
        checkpoints=checkpoints,
    )


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf belongs to a transformation that is under way."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves(tree))


def signs_like(x: Array) -> Array:
    """A fixed pattern of signs without visible order."""
    signs = 1 - 2 * (_hashes(x.size) >> 31).astype(jnp.int32)
    return signs.astype(x.dtype).reshape(x.shape)


def weights_like(x: Array, first: Array | int) -> Array:
    """Fixed numbers without visible order, of both signs and magnitudes from a half to one.

    `first` is the place of the first entry in the sequence, which differs between leaves.
    """
    hashes = _hashes(x.size, first)
    signs = 1 - 2 * (hashes >> 31).astype(jnp.float32)
    magnitudes = 0.5 + ((hashes >> 15) & 0x7FFF).astype(jnp.float32) / 0xFFFF
    return (signs * magnitudes).astype(x.dtype).reshape(x.shape)


def tree_weights(a: PyTree, start: Array | int) -> PyTree:
    """`weights_like` all entries, one leaf after the other, those of the sequence from `start`."""
    leaves, structure = jtu.tree_flatten(a)
    firsts = [sum(leaf.size for leaf in leaves[:k]) for k in range(len(leaves))]
    weights = [weights_like(x, start + first) for x, first in zip(leaves, firsts, strict=True)]
    return jtu.tree_unflatten(structure, weights)


def _hashes(size: int, first: Array | int = 0) -> Array:
    """Multiplicative hashes of the numbers from `first` on."""
    i = jnp.asarray(first, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)
    i = i * jnp.uint32(2654435761)
    return (i ^ (i >> 15)) * jnp.uint32(2246822519)


def largest_entry(a: PyTree[Array]) -> Scalar:
    """The largest magnitude in a pytree, zero for an empty one; NaN if there is one."""
    leaves = [jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(a)]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros(())


def tangent_or_zero(primal: Any, tangent: Any) -> Any:
    """A tangent that a derivative rule returns; `None` is one that stands still."""
    if tangent is not None and eqx.is_inexact_array(primal):
        return tangent
    return jax.custom_derivatives.zero_from_primal(primal, symbolic_zeros=True)


def is_symbolic(leaf: Any) -> bool:
    """Whether a tangent stands still, in the eyes of JAX."""
    return isinstance(leaf, SymbolicZero)
