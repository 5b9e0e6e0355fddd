"""Tangent systems: the columns of `D x*`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..._linear import LinearSolution
from ..._problem import AbstractCondition, Linearised
from ..._tree import map_rows, tree_basis


def tangent_columns(
    condition: AbstractCondition,
    at: Linearised,
    x: PyTree,
    theta: PyTree,
    solve: Callable[[PyTree], LinearSolution],
) -> tuple[PyTree, LinearSolution]:
    """`J_i`, `A J_i = -B e_i`, for every entry of theta along a first axis; the systems."""
    equation = condition.equation_at(x, theta)

    def column(direction: PyTree) -> tuple[PyTree, LinearSolution]:
        _, b = jax.jvp(lambda t: equation(x, t), (theta,), (direction,))
        solution = solve(b)
        return jtu.tree_map(jnp.negative, solution.value), solution

    return map_rows(column, tree_basis(theta), at.both, x)
