"""The implicit function theorem as a JAX derivative rule."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


def attach_derivative(
    residual: Callable[[PyTree, PyTree], PyTree],
    args: PyTree,
    x: PyTree[Array],
    solve: Callable[[Callable[[PyTree], PyTree], PyTree], PyTree],
    is_symmetric: bool,
) -> PyTree[Array]:
    """`x`, with the derivative in `args` of the zero of `residual(x, args)`.

    `residual(x(a), a) = 0` for all `a`, hence `A dx + d_a residual da = 0`, and
    `dx = -A^{-1} d_a residual da` with `A` the derivative of the residual in `x`.

    `solve(matvec, b)` solves with `A` or, transposed, with its transpose. Every
    transformation passes: the rule is a jvp, its linear system is one that JAX knows how
    to transpose, and `x` inside the rule carries the rule again, so that second
    derivatives see it move. `args` may hold anything; its floating-point arrays are
    differentiated.
    """
    inexact, rest = eqx.partition(args, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)

    @jax.custom_jvp
    def attached(inexact: PyTree, arrays: PyTree, x: PyTree) -> PyTree:
        del inexact, arrays
        return x

    @attached.defjvp
    def attached_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        inexact, arrays, x = primals
        x = attached(inexact, arrays, x)

        def residual_of(inexact: PyTree, x: PyTree) -> PyTree:
            return residual(x, eqx.combine(inexact, arrays, static))

        _, right_hand_side = jax.jvp(lambda a: residual_of(a, x), (inexact,), (tangents[0],))
        # custom_linear_solve can be transposed only if every leaf of the right-hand side
        # depends on the tangents; one with a zero cross derivative (a bias without
        # regulariser) does not: https://github.com/jax-ml/jax/issues/10929
        zero = sum(0 * jnp.sum(t) for t in jtu.tree_leaves(tangents[0]))
        right_hand_side = jtu.tree_map(lambda r: -r + jnp.asarray(zero, r.dtype), right_hand_side)
        _, matvec = jax.linearize(lambda x: residual_of(inexact, x), x)
        x_dot = jax.lax.custom_linear_solve(
            matvec, right_hand_side, solve, transpose_solve=solve, symmetric=is_symmetric
        )
        return x, x_dot

    return attached(inexact, arrays, jax.lax.stop_gradient(x))
