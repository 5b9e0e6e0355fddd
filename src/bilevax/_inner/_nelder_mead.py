"""What `optx.NelderMead` of Optimistix 0.1.0 needs to solve for more than one variable."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from .._tree import tree_basis


def simplex_around(solver: optx.NelderMead, y: PyTree) -> PyTree:
    """`y`, and `y` with one entry moved at a time, as rows.

    The simplex that Optimistix 0.1.0 makes of more than one variable is flat: it solves in
    a plane.
    """

    def moved(row: PyTree) -> PyTree:
        return jax.tree_util.tree_map(
            lambda a, e: a + e * (solver.adelta + solver.rdelta * a), y, row
        )

    rows = jax.tree_util.tree_map(
        lambda e: jnp.pad(e, ((1, 0),) + ((0, 0),) * (e.ndim - 1)), tree_basis(y)
    )
    return jax.vmap(moved)(rows)


def ranked(state: Any) -> tuple[PyTree, Any]:
    """The best vertex, and `state` with the vertices that its numbers are of.

    Optimistix 0.1.0 takes the best and the worst from the simplex before the step.
    """

    def vertex(index: Array) -> PyTree:
        return jax.tree_util.tree_map(lambda a: a[index], state.simplex)

    best, worst = ((value, vertex(index), index) for value, _, index in (state.best, state.worst))
    return best[1], eqx.tree_at(lambda s: (s.best, s.worst), state, (best, worst))
