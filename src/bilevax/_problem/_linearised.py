"""A condition at a point: its residual and the products with both of its derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree, Scalar

Product = Callable[[PyTree], PyTree]


class Linearised(NamedTuple):
    """The inner condition at `(x, theta)`.

    `A` and `B` are the derivatives of the residual in x and in theta.
    """

    residual: PyTree[Array]
    forward: Product  # w -> A w
    adjoint: Product  # v -> A^T v
    both: Callable[[PyTree], tuple[PyTree, PyTree]]  # v -> (A^T v, B^T v), in one pass

    def cross(self, v: PyTree) -> PyTree:
        """`B^T v`."""
        return self.both(v)[1]


def of_equation(residual: Callable, x: PyTree, theta: PyTree) -> Linearised:
    """Any map, linearised once; every product reuses it."""
    _, vjp = jax.vjp(residual, x, theta)
    value, forward = jax.linearize(lambda x: residual(x, theta), x)
    return Linearised(value, forward, lambda v: vjp(v)[0], vjp)


def of_gradient(fn: Callable[[PyTree, PyTree], Scalar], x: PyTree, theta: PyTree) -> Linearised:
    """The gradient in x of a function.

    The derivative of both gradients along `v` in x is `(A v, B^T v)`, because second
    derivatives commute: one pass forward over reverse. Where only `A v` is wanted, inside a
    Krylov loop, the compiler drops the other half.
    """
    gradients = jax.grad(fn, argnums=(0, 1))
    (residual, _), tangent = jax.linearize(lambda x: gradients(x, theta), x)

    def matvec(v: PyTree) -> PyTree:
        return tangent(v)[0]

    return Linearised(residual, matvec, matvec, tangent)
