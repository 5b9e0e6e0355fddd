"""A function that sees x through products alone: `fn(x) = rest(M_1 x, M_2 x, ...)`.

The loss of every linear model is one. Where few entries of x are not zero, its value costs as
many columns, and its gradient one product with each matrix instead of two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, Float, Int, Scalar

from .._loop._rewrite import CALLS, as_it_is, called, literal


class Predictors(NamedTuple):
    """The matrices, and what is made of their products with x."""

    matrices: list[Array]  # x is contracted with the last axis
    rest: Callable[[list[Array]], Scalar]

    def columns(self, index: Int[Array, " k"]) -> list[Array]:
        """Some columns of each; zeros for an index beyond the last."""
        return [take(matrix, index) for matrix in self.matrices]


def take(a: Float[Array, "... p"], index: Int[Array, " k"]) -> Array:
    """Entries along the last axis; zeros for an index beyond the last."""
    return jnp.take(a, index, axis=-1, mode="fill", fill_value=0)


def predictors(fn: Callable[[Array], Scalar], x: Float[Array, " p"]) -> Predictors | None:
    """`fn` taken apart, or `None` where it uses x otherwise."""
    closed = jax.make_jaxpr(fn)(x)
    found: list[Array] = []
    try:
        _run(closed.jaxpr, closed.consts, [_X], found, None)
    except _UsedOtherwiseError:
        return None
    if not found:
        return None

    def rest(products: list[Array]) -> Scalar:
        return _run(closed.jaxpr, closed.consts, [_X], [], list(products))[0]

    return Predictors(found, rest)


class _UsedOtherwiseError(Exception):
    pass


class _Marker:
    pass


_X, _LATER = _Marker(), _Marker()  # x itself; what is not known before the products are


def _run(
    jaxpr: Jaxpr, consts: Any, args: list[Any], found: list[Array], products: list[Array] | None
) -> list[Any]:
    """The program, collecting the matrices or, with their products, to its end."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return literal(atom) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if any(a is _X for a in inputs):
            outputs = _of_x(eqn, inputs, found, products)
        elif any(a is _LATER for a in inputs):
            outputs = [_LATER] * len(eqn.outvars)
        else:
            outputs = as_it_is(eqn, inputs)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_x(
    eqn: Any, inputs: list[Any], found: list[Array], products: list[Array] | None
) -> list[Any]:
    name = eqn.primitive.name
    if name in CALLS:
        inner = called(eqn.params)
        return _run(inner.jaxpr, inner.consts, inputs, found, products)
    if name != "dot_general" or all(a is _X for a in inputs):
        raise _UsedOtherwiseError
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    matrix, (axis,) = (inputs[1], right) if inputs[0] is _X else (inputs[0], left)
    if batch or matrix is _LATER:
        raise _UsedOtherwiseError
    found.append(jnp.moveaxis(matrix, axis, -1))
    if products is None:
        return [_LATER]
    return [products.pop(0).astype(eqn.outvars[0].aval.dtype)]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(most: int, matrix: Float[Array, "... p"], x: Float[Array, " p"]) -> Array:
    """`M x`, from columns where at most so many entries of x are not zero."""

    def from_columns() -> Array:
        (index,) = jnp.nonzero(x, size=most, fill_value=x.size)
        return take(matrix, index) @ take(x, index)

    return jax.lax.cond(jnp.sum(x != 0) <= most, from_columns, lambda: matrix @ x)


@partial(product.defjvp, symbolic_zeros=True)
def _derivative(most: int, primals: tuple, tangents: tuple) -> tuple[Array, Any]:
    (matrix, x), (matrix_dot, x_dot) = primals, tangents
    value = product(most, matrix, x)
    parts = []
    if not isinstance(x_dot, SymbolicZero):
        parts.append(matrix @ x_dot)
    if not isinstance(matrix_dot, SymbolicZero):
        parts.append(matrix_dot @ x)
    return value, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(value)
