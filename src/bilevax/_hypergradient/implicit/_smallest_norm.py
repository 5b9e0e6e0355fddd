"""Adjoint systems that have no solution, and need none: inner problems with many solutions."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ..._linear import DIRECT_SIZE, LinearSolution, solve_linear, verify
from ..._linear._minres import MINRES
from ..._results import RESULTS
from ..._tree import (
    default_rtol,
    is_bounded,
    signs_like,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_sub,
    where_needed,
)

Product = Callable[[PyTree], PyTree]


def smallest_norm(
    found: LinearSolution, matvec: Product, cross: Product, b: PyTree[Array]
) -> LinearSolution:
    """`A^+ b`, where `A v = b` was found to have no solution, if that serves as well.

    The response `D x* = -A^+ B` is one of many if `A` is singular. It exists if the range of
    `A` holds that of `B`, or `B^T` vanishes on the null space of `A`; then `-B^T A^+ b` is its
    product with `b`, whatever part of `b` is in the null space. That part is `b - A A^+ b`:
    `B^T` is tried on it. Else the outcome stays `singular`.

    Up to `DIRECT_SIZE` variables `found` is of `Direct(minimum_norm=True)` already.
    """
    if tree_size(b) > DIRECT_SIZE:
        is_open = found.result == RESULTS.singular
        found = where_needed(is_open, lambda: _by_minres(matvec, b), found)
        blindness = 100 * default_rtol(b)
    else:
        blindness = 10 * float(jnp.finfo(tree_dtype(b)).eps) ** 0.5
    # Least squares accepts every system, and tells by its tolerance that it did.
    assert found.tolerance is not None
    is_open = (found.result == RESULTS.successful) & ~is_bounded(found.tolerance)

    def is_blind() -> Bool[Array, ""]:
        null, pattern = tree_sub(b, matvec(found.value)), jtu.tree_map(signs_like, b)
        norm_B = tree_norm(cross(pattern)) / tree_norm(pattern)
        return tree_norm(cross(null)) <= blindness * norm_B * tree_norm(null)

    serves = where_needed(is_open, is_blind, jnp.array(True))
    result = RESULTS.where(serves, found.result, RESULTS.singular)
    return eqx.tree_at(lambda s: s.result, found, result)


def _by_minres(matvec: Product, b: PyTree[Array]) -> LinearSolution:
    second = solve_linear(MINRES(minimum_norm=True), matvec, b)
    return verify(second, b, matvec(second.value))
