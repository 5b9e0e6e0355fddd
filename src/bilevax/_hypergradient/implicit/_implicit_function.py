"""The implicit function theorem as a JAX derivative rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ..._tree import is_symbolic, stop_gradient


class System(NamedTuple):
    """A linear system with the derivative of the residual in x, or with its transpose."""

    matvec: Callable[[PyTree], PyTree]
    cross: Callable[[PyTree], PyTree]  # w -> B^T w, B the derivative in what is differentiated
    is_transposed: bool = False


def attach_derivative(
    residual: Callable[[PyTree, PyTree], PyTree],
    args: PyTree,
    x: PyTree[Array],
    solve: Callable[[Any, System, PyTree], PyTree],
    memory: PyTree,
    is_symmetric: bool,
    failed: Bool[Array, ""] | None = None,
) -> PyTree[Array]:
    """`x`, with the derivative in `args` of the zero of `residual(x, args)`.

    `residual(x(a), a) = 0` for all `a`, hence `A dx + d_a residual da = 0`, and
    `dx = -A^{-1} d_a residual da` with `A` the derivative of the residual in `x`.

    `solve(memory, system, b)` solves with `A` or, transposed, with its transpose. Every
    transformation passes: the rule is a jvp, its linear system is one that JAX knows how
    to transpose, and `x` inside the rule carries the rule again, so that second
    derivatives see it move. `args` may hold anything; its floating-point arrays are
    differentiated.

    JAX runs the rule when the values of this call are gone. So `residual` and `solve`
    close over no arrays: what they need is in `args` and, taken as constant, in `memory`.

    Where `failed`, `x` is no solution, and the derivative of the residual there may be
    NaN: a tangent or cotangent of zero stays zero all the same, any other fails in `solve`.
    """
    inexact, rest = eqx.partition(args, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)
    constant, constant_static = eqx.partition(stop_gradient((memory, failed)), eqx.is_array)

    @jax.custom_jvp
    def attached(inexact: PyTree, arrays: PyTree, constant: PyTree, x: PyTree) -> PyTree:
        del inexact, arrays, constant
        return x

    def attached_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        inexact, arrays, constant, x = primals
        memory, failed = eqx.combine(constant, constant_static)
        x = attached(inexact, arrays, constant, x)
        # what stands still costs nothing, and need not have a derivative
        moves = jtu.tree_map(_moves, tangents[0], is_leaf=is_symbolic)
        tangent = eqx.filter(tangents[0], moves, is_leaf=is_symbolic)
        moving, still = eqx.partition(inexact, moves)

        def residual_of(moving: PyTree, x: PyTree) -> PyTree:
            return residual(x, eqx.combine(moving, still, arrays, static))

        right_hand_side = _right_hand_side(lambda a: residual_of(a, x), moving, tangent, failed)
        _, matvec = jax.linearize(lambda x: residual_of(moving, x), x)

        def cross(w: PyTree) -> PyTree:
            return jax.vjp(lambda a: residual_of(a, x), moving)[1](w)[0]

        def solve_here(matvec: Callable, b: PyTree) -> PyTree:
            return solve(memory, System(matvec, cross), b)

        def solve_transposed(matvec: Callable, b: PyTree) -> PyTree:
            return solve(memory, System(matvec, cross, is_transposed=True), b)

        x_dot = jax.lax.custom_linear_solve(
            matvec,
            right_hand_side,
            solve_here,
            transpose_solve=solve_transposed,
            symmetric=is_symmetric,
        )
        return x, _all_seen(x_dot)

    attached.defjvp(attached_jvp, symbolic_zeros=True)
    return attached(inexact, arrays, constant, jax.lax.stop_gradient(x))


def _right_hand_side(
    residual: Callable[[PyTree], PyTree],
    moving: PyTree,
    tangent: PyTree,
    failed: Bool[Array, ""] | None,
) -> PyTree:
    """`-d_a residual da`, linear in `da` in the eyes of JAX.

    custom_linear_solve can be transposed only if every leaf of the right-hand side depends
    on the tangents; one with a zero cross derivative (a bias without regulariser) does not:
    https://github.com/jax-ml/jax/issues/10929. So zero times their sum is added. Where
    `failed` the sum itself takes the place of the derivative, which may be NaN times zero.
    """
    total = sum(jnp.sum(t).astype(float) for t in jtu.tree_leaves(tangent))
    weight = 0.0 if failed is None else jnp.where(failed, 1.0, 0.0)
    if failed is not None:
        tangent = jtu.tree_map(lambda t: jnp.where(failed, 0, t), tangent)
    _, product = jax.jvp(residual, (moving,), (tangent,))
    if failed is not None:
        product = jtu.tree_map(lambda r: jnp.where(failed, 0, r), product)
    return jtu.tree_map(lambda r: -r + jnp.asarray(weight * total, r.dtype), product)


def _all_seen(x_dot: PyTree[Array]) -> PyTree[Array]:
    """`x_dot`, of which no leaf is unused in the eyes of JAX.

    custom_linear_solve cannot be transposed where the cotangent of a leaf is a symbolic zero, as
    that of multipliers which nobody asks for. So zero times their sum is added.
    """
    leaves = jtu.tree_leaves(x_dot)
    if len(leaves) < 2:
        return x_dot
    nothing = 0 * sum((jnp.sum(leaf) for leaf in leaves[1:]), jnp.sum(leaves[0]))
    return jtu.tree_map(lambda leaf: leaf + nothing, x_dot)


def _moves(tangent: Any) -> bool:
    return not is_symbolic(tangent)
