"""A bound on the error of an implicit hypergradient, from a modulus of strong convexity."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from ..._linear._common import largest_eigenvalue
from ..._problem import Bilevel
from ..._tree import tree_dot, tree_norm, tree_size

# The power method underestimates; after ten steps by little.
_NORM_MARGIN = 1.1
# Of the constants between x and its Newton point, which is all that is measured.
_SAFETY = 2.0
_ROUNDING = 8.0
# At each of two points ten of x and, mixed, ten of each kind; ten for the norm of A.
BOUND_PRODUCTS = 110


def error_bound(
    problem: Bilevel,
    x: PyTree[Array],
    newton_x: PyTree[Array],
    theta: PyTree,
    v: PyTree[Array],
    modulus: Scalar,
) -> Scalar:
    """`||grad - exact|| <= error_bound` for `grad = d_theta L - B^T v` at `(x, v)`.

    Let `phi = L - v' grad_x U`, whose gradients are the adjoint residual
    `rho = d_x L - A v` and `grad` itself. With `mu` the modulus, `e = ||grad_x U|| / mu`
    is at least `||x - x*||`, and

        ||v - v*|| <= (||rho|| + ||phi_xx|| e) / mu,
        ||grad - exact|| <= ||B|| ||v - v*|| + ||phi_theta,x|| e,

    the norms being the largest between x and x*. They are measured at x and at the
    Newton point, the variation between the two is added four times over, and the sum is
    doubled: for problems whose third derivatives vary more than that between x and x*, it
    is no bound. Rounding errors of the products are added.

    `BOUND_PRODUCTS` products, some of third order. After Ehrhardt and Roberts, "Analyzing inexact
    hypergradients for bilevel learning" (2023, arXiv:2301.04764), in the form that needs
    only the two norms of phi.
    """
    inner = problem.inner.objective
    assert inner is not None

    def phi(x: PyTree, theta: PyTree) -> Scalar:
        value, _ = problem.outer_value(x, theta)
        residual = problem.inner.residual_here(x, theta)
        return value - tree_dot(v, residual).astype(value.dtype)

    def norms(x: PyTree) -> Array:
        curvature = largest_eigenvalue(_x_product(phi, x, theta), x)
        return jnp.stack(
            [
                curvature.astype(modulus.dtype),
                _cross_norm(phi, x, theta).astype(modulus.dtype),
                _cross_norm(inner, x, theta).astype(modulus.dtype),
            ]
        )

    points = jtu.tree_map(lambda a, b: jnp.stack([a, b]), x, newton_x)
    here, there = jax.lax.map(norms, points)
    variation = 4 * jnp.abs(here - there)
    largest = _NORM_MARGIN * jnp.maximum(here, there) + variation
    curvature, moves, cross = _SAFETY * largest[0], _SAFETY * largest[1], largest[2]

    at = problem.inner.linearise(x, theta)
    eps = _ROUNDING * float(jnp.finfo(modulus.dtype).eps)
    norm_A = _NORM_MARGIN * largest_eigenvalue(at.forward, x)
    rho, grad = jax.grad(phi, argnums=(0, 1))(x, theta)
    size_x, size_v = tree_norm(x), tree_norm(v)
    distance = (tree_norm(at.residual) + eps * norm_A * size_x) / modulus
    error_v = (tree_norm(rho) + eps * norm_A * size_v + curvature * distance) / modulus
    return cross * error_v + moves * distance + eps * (cross * size_v + tree_norm(grad))


def _x_product(fn: Callable, x: PyTree, theta: PyTree) -> Callable[[PyTree], PyTree]:
    grad = jax.grad(fn)
    return jax.linearize(lambda x: grad(x, theta), x)[1]


def _cross_norm(fn: Callable, x: PyTree, theta: PyTree) -> Scalar:
    """The largest singular value of the mixed second derivative of `fn`."""
    if tree_size(x) == 0 or tree_size(theta) == 0:
        return jnp.zeros((), tree_norm(x).dtype)
    gradients = jax.grad(fn, argnums=(0, 1))

    def normal(d: PyTree) -> PyTree:
        along = jax.jvp(lambda x: gradients(x, theta), (x,), (d,))[1][1]
        return jax.jvp(lambda theta: gradients(x, theta)[0], (theta,), (along,))[1]

    return jnp.sqrt(largest_eigenvalue(normal, x))
