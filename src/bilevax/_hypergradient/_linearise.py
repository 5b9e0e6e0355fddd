"""The problem at a point: values, gradients and products, from one linearisation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree, Scalar

from .._problem import AbstractCondition, Bilevel
from .._tree import tree_dot, tree_sub

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
    inner = condition.objective
    if inner is None:
        _, vjp = jax.vjp(condition.residual, x, theta)
        residual, forward = jax.linearize(lambda x: condition.residual(x, theta), x)
        return Linearised(residual, forward, lambda v: vjp(v)[0], vjp)
    gradients = jax.grad(inner, argnums=(0, 1))
    (residual, _), tangent = jax.linearize(lambda x: gradients(x, theta), x)

    def matvec(v: PyTree) -> PyTree:
        return tangent(v)[0]

    return Linearised(residual, matvec, matvec, tangent)


class Point(NamedTuple):
    """The whole problem at `(x, theta)`: the inner condition linearised, the outer objective."""

    at: Linearised
    value: Scalar
    aux: PyTree
    grad_x: PyTree[Array]
    grad_theta: PyTree[Array]

    def hypergradient(self, v: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        """`d_theta L - B^T v` and `A^T v`, in one pass."""
        product, cross = self.at.both(v)
        return tree_sub(self.grad_theta, cross), product

    def dual_value(self, v: PyTree[Array]) -> Scalar:
        """`L(x) - v' residual`: the error of x enters to second order only."""
        return dual_value(self.value, v, self.at.residual)


def point(problem: Bilevel, x: PyTree, theta: PyTree) -> Point:
    """Everything that a rule may ask for at `(x, theta)`: two gradients, one linearisation."""
    fn = jax.value_and_grad(problem.outer_value, argnums=(0, 1), has_aux=True)
    (value, aux), grads = fn(x, theta)
    return Point(linearise(problem.inner, x, theta), value, aux, *grads)


class Directions(NamedTuple):
    """Down which x, v and theta move together; all zero at a solution of the whole problem."""

    x: PyTree[Array]
    v: PyTree[Array]
    theta: PyTree[Array]


def directions(problem: Bilevel, x: PyTree, v: PyTree, theta: PyTree) -> Directions:
    """`residual`, `A^T v - d_x L` and `d_theta L - B^T v`, at any `(x, v, theta)`.

    Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", 2022, equations (5) to (7); v with
    the other sign.
    """
    at = point(problem, x, theta)
    grad, product = at.hypergradient(v)
    return Directions(at.at.residual, tree_sub(product, at.grad_x), grad)


def dual_value(value: Scalar, v: PyTree, residual: PyTree) -> Scalar:
    """`L(x) - v' residual`, see `Point.dual_value`."""
    return value - tree_dot(v, residual).astype(value.dtype)
