"""Both modes from reverse mode alone.

`jax.custom_vjp` has no forward mode, and a Hessian product is forward over reverse. But
with the scalar `s(p, w) = <f(p), w>` every derivative of `f` is a block of the Hessian of
`s`, which is symmetric, times a vector:

    H_ab t = grad_a <grad_b s, t>,

two gradients, one of the other. In `t` the product is linear, its transpose is `H_ba`, and
`<grad_b s, t>` is again a scalar of `p`, `w` and `t`, so that derivatives of the product
are such products. One primitive with these rules therefore serves every transformation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Scalar

from .._tree import tree_dot
from ._refusal import REFUSALS, no_derivative

Arrays = Sequence[Array]
Flat = Callable[[Arrays], list[Array]]


def by_reverse(fn: Flat) -> Flat:
    """`fn`, of which only reverse mode is ever asked."""

    @eqx.filter_custom_jvp
    def call(arrays: Arrays) -> list[Array]:
        return fn(arrays)

    @call.def_jvp
    def call_jvp(primals: tuple, tangents: tuple) -> tuple[list[Array], list[Array]]:
        (arrays,), (dots,) = primals, tangents
        num = len(arrays)
        out = call(arrays)

        def potential(*operands: Array) -> Scalar:
            return tree_dot(fn(operands[:num]), list(operands[num:]))

        operands = [*arrays, *map(jnp.zeros_like, out)]
        moving = tuple(i for i, dot in enumerate(dots) if dot is not None)
        weights = tuple(range(num, len(operands)))
        return out, _product(potential, operands, [dots[i] for i in moving], weights, moving)

    return call


def _product(
    potential: Callable[..., Scalar],
    operands: Arrays,
    vectors: Arrays,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
) -> list[Array]:
    """`H_ab t` with `a` and `b` the operands named by `rows` and `columns`."""
    traced = jax.make_jaxpr(potential)(*operands)
    return _product_p.bind(*operands, *vectors, potential=traced, rows=rows, columns=columns)


def _split(args: Arrays, potential: ClosedJaxpr) -> tuple[list, list]:
    num = len(potential.in_avals)
    return list(args[:num]), list(args[num:])


def _slope(potential: Callable[..., Scalar], columns: tuple[int, ...], num: int) -> Callable:
    """`<grad_b s(q), t>`, a function of `q`, of length `num`, and `t`."""

    def slope(*args: Array) -> Scalar:
        return tree_dot(_gradient(potential, columns, args[:num]), list(args[num:]))

    return slope


def _gradient(potential: Callable, which: tuple[int, ...], operands: Arrays) -> list[Array]:
    if not which:
        return []
    try:
        return list(jax.grad(potential, argnums=which)(*operands))
    except REFUSALS as error:
        raise no_derivative(error) from error


def _as_function(potential: ClosedJaxpr) -> Callable[..., Scalar]:
    fn = jaxpr_as_fun(potential)
    return lambda *operands: fn(*operands)[0]


def _evaluate(
    *args: Array, potential: ClosedJaxpr, rows: tuple[int, ...], columns: tuple[int, ...]
) -> list[Array]:
    num = len(potential.in_avals)
    return _gradient(_slope(_as_function(potential), columns, num), rows, args)


def _abstract(*avals: Any, potential: ClosedJaxpr, rows: tuple, columns: tuple) -> list[Any]:
    del potential, columns
    return [avals[i] for i in rows]


def _jvp(
    primals: Arrays, tangents: Sequence, *, potential: ClosedJaxpr, rows: tuple, columns: tuple
) -> tuple[list, list]:
    settings = {"potential": potential, "rows": rows, "columns": columns}
    operands, _ = _split(primals, potential)
    out = _product_p.bind(*primals, **settings)
    dots, vector_dots = _split(tangents, potential)
    out_dots = []
    if not all(_is_zero(dot) for dot in vector_dots):
        vector_dots = [ad.instantiate_zeros(dot) for dot in vector_dots]
        out_dots.append(_product_p.bind(*operands, *vector_dots, **settings))
    moving = tuple(i for i, dot in enumerate(dots) if not _is_zero(dot))
    if moving:
        slope = _slope(_as_function(potential), columns, len(operands))
        out_dots.append(_product(slope, primals, [dots[i] for i in moving], rows, moving))
    return out, [sum(parts[1:], parts[0]) for parts in zip(*out_dots, strict=True)]


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _transpose(
    cotangents: Sequence, *args: Any, potential: ClosedJaxpr, rows: tuple, columns: tuple
) -> list:
    operands, _ = _split(args, potential)
    vectors = [ad.instantiate_zeros(c) for c in cotangents]
    out = _product_p.bind(*operands, *vectors, potential=potential, rows=columns, columns=rows)
    return [None] * len(operands) + list(out)


def _batch(
    args: Arrays, dims: Sequence, *, potential: ClosedJaxpr, rows: tuple, columns: tuple
) -> tuple[list, list]:
    """Of a batch the potentials are summed: no element sees the others."""
    num = len(potential.in_avals)
    (size,) = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
    # What has a row or a column needs one of its own in every element.
    own = {*rows, *columns, *range(num, len(args))}

    def placed(i: int, a: Array, dim: int | None) -> Array:
        if dim is None:
            return jnp.broadcast_to(a, (size, *jnp.shape(a))) if i in own else a
        return jnp.moveaxis(a, dim, 0)

    arrays = [placed(i, a, d) for i, (a, d) in enumerate(zip(args, dims, strict=True))]
    axes = [0 if d is not None or i in own else None for i, d in enumerate(dims[:num])]
    fn = jax.vmap(_as_function(potential), in_axes=tuple(axes))

    def total(*operands: Array) -> Scalar:
        return jnp.sum(fn(*operands))

    return _product(total, arrays[:num], arrays[num:], rows, columns), [0] * len(rows)


_product_p = Primitive("hessian_product")
_product_p.multiple_results = True
_product_p.def_impl(_evaluate)
_product_p.def_abstract_eval(_abstract)
mlir.register_lowering(_product_p, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_product_p] = _jvp
ad.primitive_transposes[_product_p] = _transpose
batching.primitive_batchers[_product_p] = _batch
