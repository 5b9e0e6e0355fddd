"""Both modes from forward mode alone: whole Jacobians, for few variables."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._tree import map_rows, tree_basis, tree_size

Arrays = Sequence[Array]
Flat = Callable[[Arrays], list[Array]]

# One pass through the function for each variable, and for second derivatives each pair.
MOST_VARIABLES = 64


def by_forward(fn: Flat) -> Flat:
    """`fn`, of which only forward mode is ever asked.

    The tangent is a matrix times a vector, which JAX can transpose, and the matrix another
    function of which only forward mode is asked.
    """

    @eqx.filter_custom_jvp
    def call(arrays: Arrays) -> list[Array]:
        return fn(arrays)

    @call.def_jvp
    def call_jvp(primals: tuple, tangents: tuple) -> tuple[list[Array], list[Array]]:
        (arrays,), (dots,) = primals, tangents
        moving = tuple(i for i, dot in enumerate(dots) if dot is not None)
        dots = [dots[i] for i in moving]
        _check_size(tree_size(dots))
        jacobian = by_forward(lambda arrays: _jacobian(fn, moving, arrays))(arrays)
        flat = jnp.concatenate([dot.reshape(-1) for dot in dots])
        return call(arrays), [jnp.tensordot(flat.astype(j.dtype), j, 1) for j in jacobian]

    return call


def _jacobian(fn: Flat, moving: tuple[int, ...], arrays: Arrays) -> list[Array]:
    """The derivatives along every variable of `moving`, stacked."""

    def of(values: list[Array]) -> list[Array]:
        placed = list(arrays)
        for i, value in zip(moving, values, strict=True):
            placed[i] = value
        return fn(placed)

    at = [arrays[i] for i in moving]
    return map_rows(lambda direction: jax.jvp(of, (at,), (direction,))[1], tree_basis(at))


def _check_size(size: int) -> None:
    if size > MOST_VARIABLES:
        raise ValueError(
            "One of your functions has no derivative in reverse mode (it runs a "
            "jax.lax.while_loop, or a fori_loop of a length that is not known before). By forward "
            f"mode the gradient takes one pass for each variable, and there are {size}, more "
            f"than {MOST_VARIABLES}. Write the loop as a jax.lax.scan, or a fori_loop, of a fixed "
            "length, which does nothing once it has converged; or state the derivative of what "
            "the loop computes by jax.custom_jvp; or, if the loop solves an equation, by "
            "bx.argmin(bx.Root(equation), bx.Given())(found, theta)."
        )
