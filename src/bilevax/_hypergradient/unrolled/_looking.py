"""The identity, which looks at what JAX sends through it, forwards and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

Look = Callable[[PyTree, PyTree], PyTree]


def looking(b: PyTree[Array], fixed: PyTree[Array], ahead: Look, back: Look) -> PyTree[Array]:
    """`b`, for the tangents in a derivative rule: in the eyes of JAX linear.

    Forwards it is `ahead(b, fixed)`, and its cotangent `c` goes back as `back(c, fixed)`; both
    return what is like `b`, and may raise. These are of the first order only: a derivative of
    what is seen goes through unseen.
    """
    leaves, structure = jtu.tree_flatten(b)
    rest, fixed_structure = jtu.tree_flatten(fixed)

    def flat(look: Look) -> Callable[..., list]:
        def call(leaves: list, rest: list) -> list:
            seen = look(structure.unflatten(leaves), fixed_structure.unflatten(rest))
            return structure.flatten_up_to(seen)

        return call

    out = _looking_p.bind(*leaves, *rest, num=len(leaves), ahead=flat(ahead), back=flat(back))
    return structure.unflatten(out)


def _ahead(*args: Array, num: int, ahead: Callable, back: Callable) -> list:
    del back
    return ahead(list(args[:num]), list(args[num:]))


def _abstract(*avals: Any, num: int, **_: Any) -> list:
    return list(avals[:num])


def _jvp(primals: tuple, tangents: tuple, **params: Any) -> tuple[list, list]:
    return _looking_p.bind(*primals, **params), list(tangents[: params["num"]])


def _transpose(cotangents: list, *args: Any, num: int, ahead: Callable, back: Callable) -> list:
    del ahead
    through = back([ad.instantiate_zeros(c) for c in cotangents], list(args[num:]))
    is_linear = [ad.is_undefined_primal(a) for a in args[:num]]
    given = [c if is_it else None for c, is_it in zip(through, is_linear, strict=True)]
    return given + [None] * (len(args) - num)


def _batch(
    args: list, dims: list, *, num: int, ahead: Callable, back: Callable
) -> tuple[list, list]:
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)

    def with_batch(a: Array, d: int | None) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)

    linear = [with_batch(a, d) for a, d in zip(args[:num], dims[:num], strict=True)]
    over = partial(jax.vmap, in_axes=(0, list(dims[num:])), axis_size=size)
    out = _looking_p.bind(*linear, *args[num:], num=num, ahead=over(ahead), back=over(back))
    return out, [0] * num


_looking_p = Primitive("looking")
_looking_p.multiple_results = True
_looking_p.def_impl(_ahead)
_looking_p.def_abstract_eval(_abstract)
mlir.register_lowering(_looking_p, mlir.lower_fun(_ahead, multiple_results=True))
ad.primitive_jvps[_looking_p] = _jvp
ad.primitive_transposes[_looking_p] = _transpose
batching.primitive_batchers[_looking_p] = _batch
