"""The problem at a point: values, gradients and products, from one linearisation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree, Scalar

from .._problem import AbstractCondition, Bilevel, objective

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


def linearise(condition: AbstractCondition, x: PyTree, theta: PyTree) -> Linearised:
    """Linearise the condition once; every product reuses it.

    Of an objective `U` the derivative of both gradients along `v` in x is `(A v, B^T v)`,
    because second derivatives commute: one pass forward over reverse. Where only `A v` is
    wanted, inside a Krylov loop, the compiler drops the other half.
    """
    inner = objective(condition)
    if inner is None:
        _, vjp = jax.vjp(condition.residual, x, theta)
        residual, forward = jax.linearize(lambda x: condition.residual(x, theta), x)
        return Linearised(residual, forward, lambda v: vjp(v)[0], vjp)
    gradients = jax.grad(inner, argnums=(0, 1))
    (residual, _), tangent = jax.linearize(lambda x: gradients(x, theta), x)

    def matvec(v: PyTree) -> PyTree:
        return tangent(v)[0]

    return Linearised(residual, matvec, matvec, tangent)


class Outer(NamedTuple):
    """The outer objective at `(x, theta)`."""

    value: Scalar
    aux: PyTree
    grad_x: PyTree[Array]
    grad_theta: PyTree[Array]


def outer_at(problem: Bilevel, x: PyTree, theta: PyTree) -> Outer:
    """Value and gradients of the outer objective."""
    fn = jax.value_and_grad(problem.outer_value, argnums=(0, 1), has_aux=True)
    (value, aux), grads = fn(x, theta)
    return Outer(value, aux, *grads)
