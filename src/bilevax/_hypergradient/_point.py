"""The problem at a point: values, gradients and products, from one linearisation."""

from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel, Linearised
from .._tree import tree_dot, tree_sub


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
    return Point(problem.inner.linearise(x, theta), value, aux, *grads)


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
