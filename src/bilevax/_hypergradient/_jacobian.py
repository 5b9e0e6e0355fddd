"""The Jacobian of the solution map, for people who want the matrix."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._inner._asked import asked_of
from .._inner._base import Counts
from .._inner._external import Given
from .._jit import lean_jit
from .._linear import LinearSolution
from .._problem import Bilevel, as_arrays, prepare
from .._results import RESULTS, first_failure
from .._tree import flat_to_tree, map_rows, tree_basis, tree_size
from ._base import as_stats
from ._entry import check_types, raise_failure
from ._locate import locating
from .implicit._adjoint import first_of_batch, reached
from .implicit._implicit import Implicit
from .implicit._rule import AbstractImplicit
from .implicit._tangent import tangent_columns


class Jacobian(eqx.Module):
    """`D x*(theta)` with its evidence.

    **Attributes:**

    - `value`: the structure of x, of the structure of theta; a leaf has the shape of the
        leaf of x followed by that of the leaf of theta.
    - `inner_residual`, `inner_tolerance`, `result`, `stats`: as in `Estimate`.
    - `adjoint_residual`: the largest relative residual of the linear systems solved.
    """

    value: PyTree[Array]
    inner_residual: Scalar
    inner_tolerance: Scalar
    adjoint_residual: Scalar
    result: RESULTS
    stats: dict[str, Array]


def jacobian(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    *,
    rule: Implicit | None = None,
    throw: bool = True,
) -> Jacobian:
    """`D x*(theta) = -A^{-1} B` at a solution `x`, by the cheaper of forward and reverse.

    Forward: one system `A J = -B` for every entry of theta. Reverse: one system
    `A^T w = e_i` for every entry of x. All of them are solved in one batch. For a
    hypergradient this is the hard way round: `bx.hypergradient` solves a single system.

    **Arguments:**

    - `x`: the inner solution at theta; it is checked.
    - `rule`: a `bx.Implicit` with the linear solver to use.
    - `throw`: raise `bx.SolveError` if `x` is no solution or a system was not solved.

    **Returns:** a `Jacobian`.

    **Cost:** as many linear solves as the smaller of the two sizes, and as many cross
    products.

    **Exact when** `x` and the systems are exact; the error is of first order in both.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(lambda x, t: jnp.sum((x - t**2) ** 2), lambda x, t: jnp.sum(x))
        bx.jacobian(problem, jnp.array([1.0, 4.0]), jnp.array([1.0, 2.0])).value
        ```

    Reference: Blondel et al., "Efficient and modular implicit differentiation", 2022, eq. (2).
    """
    rule = Implicit() if rule is None else rule
    check_types(problem, rule)
    if not isinstance(rule, AbstractImplicit):
        raise TypeError(f"`rule` must be a bx.Implicit; got {type(rule).__name__}.")
    x, theta = as_arrays(x), as_arrays(theta)
    out = locating(partial(_jacobian, problem, x, theta, rule), problem, Given(), x, theta)
    return raise_failure(out) if throw else out


@lean_jit
def _jacobian(problem: Bilevel, x: PyTree, theta: PyTree, rule: AbstractImplicit) -> Jacobian:
    bound, x, theta = prepare(problem, x, theta)
    inner, _ = Given().solve(bound.inner, x, theta, None)
    forward = tree_size(theta) <= tree_size(x)
    value, systems = (_forward if forward else _reverse)(bound, x, theta, rule)
    num_systems = systems.residual.shape[0]
    counts = inner.counts + Counts(hessian=jnp.sum(systems.num_products), cross=num_systems)
    return Jacobian(
        value=value,
        inner_residual=inner.residual,
        inner_tolerance=inner.tolerance,
        adjoint_residual=jnp.max(systems.residual),
        result=first_failure(inner.result, first_of_batch(systems)),
        stats=as_stats(counts, 0, jnp.sum(systems.num_steps)),
    )


def _forward(
    problem: Bilevel, x: PyTree, theta: PyTree, rule: AbstractImplicit
) -> tuple[PyTree, LinearSolution]:
    """Columns: `A J_i = -B e_i`."""
    at = problem.inner.linearise(x, theta)
    end = reached(at.residual, x, x, asked_of(Given(), x))

    def solve(b: PyTree) -> LinearSolution:
        return rule.solve_adjoint(
            at.forward, b, problem.inner, x, theta, cross=at.cross, end=end, is_transposed=False
        )

    columns, systems = tangent_columns(problem.inner, at, x, theta, solve)
    # Columns come first; the entries of theta belong last.
    value = jtu.tree_map(lambda c: flat_to_tree(jnp.moveaxis(c, 0, -1), theta), columns)
    return value, systems


def _reverse(
    problem: Bilevel, x: PyTree, theta: PyTree, rule: AbstractImplicit
) -> tuple[PyTree, LinearSolution]:
    """Rows: `A^T w_i = e_i`, and `-B^T w_i`."""
    at = problem.inner.linearise(x, theta)
    end = reached(at.residual, x, x, asked_of(Given(), x))

    def row(direction: PyTree) -> tuple[PyTree, LinearSolution]:
        solution = rule.solve_adjoint(
            at.adjoint,
            direction,
            problem.inner,
            x,
            theta,
            cross=at.cross,
            end=end,
            is_transposed=True,
        )
        return jtu.tree_map(jnp.negative, at.both(solution.value)[1]), solution

    rows, systems = map_rows(row, tree_basis(x), at.both, x)
    leaves, structure = jtu.tree_flatten(x)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)

    def block(i: int) -> PyTree:
        shape = leaves[i].shape
        return jtu.tree_map(lambda r: r[ends[i] : ends[i + 1]].reshape(shape + r.shape[1:]), rows)

    return jtu.tree_unflatten(structure, [block(i) for i in range(len(leaves))]), systems
