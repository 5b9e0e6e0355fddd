"""What the linear solvers share: checks of arguments, the start, the largest eigenvalue."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._results import RESULTS
from .._tree import (
    default_rtol,
    largest_entry,
    signs_like,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from ._base import LinearSolution

_POWER_STEPS = 10


def target_norm(
    rtol: float | Scalar | None,
    atol: float | Scalar,
    b: PyTree[Array],
    norm_b: Scalar,
    scale: Scalar,
) -> Scalar:
    """What the norm of the residual must reach: `atol + rtol ||b||`, `b` divided by `scale`."""
    rtol = default_rtol(b) if rtol is None else rtol
    return jnp.asarray(atol, norm_b.dtype) / jnp.where(scale > 0, scale, 1) + rtol * norm_b


def step_limit(max_steps: int | None, b: PyTree[Array]) -> int:
    """`max_steps`, by default ten times the size of `b`, at most 10,000."""
    return min(10 * tree_size(b), 10_000) if max_steps is None else max_steps


def scaled_start(
    matvec: Callable[[PyTree], PyTree], b: PyTree[Array], v0: PyTree[Array] | None
) -> tuple[Scalar, PyTree[Array], PyTree[Array], PyTree[Array], Int[Array, ""]]:
    """The scale of `b`; `b`, the first iterate and its residual, divided by it; products.

    A guess of zeros, which is what a first call with a state has, costs no product.
    Scaled to entries of order one, because squares under- and overflow in float32.
    The scale is zero where `b` is, and not one: XLA computes `b` anew wherever it is used,
    rounded otherwise, and what was divided by rounding may be multiplied by that one.
    """
    scale = largest_entry(b)
    scale = jnp.where(jnp.isfinite(scale), scale, 1)
    unit = jnp.where(scale > 0, scale, 1)
    b = jtu.tree_map(lambda x: x / unit, b)
    # Without a guess r = b: A(0), a constant, is miscompiled on CPU in float32.
    zero = tree_zeros_like(b)
    if v0 is None:
        return scale, b, zero, b, jnp.zeros((), jnp.int32)
    guess = jtu.tree_map(lambda x: x / unit, v0)

    def start_at_guess() -> tuple[PyTree[Array], PyTree[Array]]:
        r = tree_sub(b, matvec(guess))
        # A guess worse than zero is dropped; the test is false also where it is not finite.
        is_better = tree_dot(r, r) <= tree_dot(b, b)
        return tree_where(is_better, guess, zero), tree_where(is_better, r, b)

    is_guess = largest_entry(guess) > 0
    v, r = jax.lax.cond(is_guess, start_at_guess, lambda: (zero, b))
    return scale, b, v, r, is_guess.astype(jnp.int32)


def of_order_one(matrix: Float[Array, "d e"]) -> tuple[Array, Array, Array]:
    """`diag(rows) A diag(columns)` with entries of order one, and both diagonals."""
    rows = _inverse(jnp.max(jnp.abs(matrix), axis=1))
    scaled = rows[:, None] * matrix
    columns = _inverse(jnp.max(jnp.abs(scaled), axis=0))
    return scaled * columns[None, :], rows, columns


def _inverse(size: Float[Array, " d"]) -> Float[Array, " d"]:
    return 1 / jnp.where(size > 0, size, 1)


def without_steps(
    value: PyTree[Array], residual: Scalar, tolerance: Scalar, num_products: int, result: RESULTS
) -> LinearSolution:
    """The solution of a solver that factorises."""
    no_steps, products = jnp.zeros((), jnp.int32), jnp.asarray(num_products, jnp.int32)
    return LinearSolution(value, residual, tolerance, no_steps, products, result)


def largest_eigenvalue(matvec: Callable[[PyTree], PyTree], b: PyTree[Array]) -> Scalar:
    """The largest eigenvalue in magnitude, by ten steps of the power method.

    An underestimate. Starts from `b` plus a fixed pattern of signs, so that a `b`
    orthogonal to the leading eigenvector does no harm. Ten products.
    """

    def step(_: int, carry: tuple[PyTree, Scalar]) -> tuple[PyTree, Scalar]:
        u, norm = carry
        u = jtu.tree_map(lambda x: x / jnp.where(norm > 0, norm, 1), u)
        u = matvec(u)
        return u, tree_norm(u)

    u = jtu.tree_map(lambda x: x + signs_like(x), b)
    _, norm = jax.lax.fori_loop(0, _POWER_STEPS, step, (u, tree_norm(u)))
    return norm


def find_step_size(
    step_size: float | Scalar | None, matvec: Callable[[PyTree], PyTree], b: PyTree[Array]
) -> tuple[Scalar, int]:
    """`step_size`, or one over the largest eigenvalue; and the products that it cost."""
    if step_size is not None:
        return jnp.asarray(step_size, tree_dtype(b)), 0
    # Five per cent for the underestimate; descent is stable up to twice this step.
    largest = 1.05 * largest_eigenvalue(matvec, b)
    return jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 1), _POWER_STEPS
