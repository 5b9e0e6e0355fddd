"""The compiled parts of `check`: each is one function of the problem and a point."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from ..._inner._base import AbstractInnerSolver, residual_and_scale
from ..._inner._default import as_inner_solver
from ..._jit import lean_jit
from ..._linear import CG, GMRES, solve_linear
from ..._problem import Bilevel
from ..._results import RESULTS
from ..._tree import tree_all_finite, tree_axpy, tree_dot, tree_norm, tree_sub, tree_where
from ._lanczos import largest_singular_value


class Solved(NamedTuple):
    """The inner problem solved again, and the outer objective there."""

    x: PyTree[Array]
    value: Scalar
    residual: Scalar
    scale: Scalar  # what the residual is compared with
    moved: Scalar  # distance from the start


def solve_again(problem: Bilevel, inner_solver: Any, x: PyTree, theta: PyTree) -> Solved:
    """`x*(theta)` from `x` by any inner solver; a black box runs on the host."""
    solver = as_inner_solver(inner_solver, problem.inner, x)
    solver, start = solver.before(problem.inner, x, theta)
    solved = _solve_again(problem, solver, start, theta)
    return solved if start is x else solved._replace(moved=tree_norm(tree_sub(start, x)))


@lean_jit
def _solve_again(problem: Bilevel, solver: AbstractInnerSolver, x: PyTree, theta: PyTree) -> Solved:
    state = solver.init(problem.inner, x, theta)
    solution, _ = solver.solve(problem.inner, x, theta, state)
    value, _ = problem.outer_value(solution.x, theta)
    residual, scale = residual_and_scale(problem.inner, solution.x, x, theta)
    return Solved(solution.x, value, residual, scale, tree_norm(tree_sub(solution.x, x)))


class AtPoint(NamedTuple):
    """What one look at `x` says."""

    value: Scalar
    residual: PyTree[Array]
    residual_norm: Scalar
    scale: Scalar
    x_norm: Scalar
    theta_norm: Scalar
    direct_norm: Scalar  # of d_theta L
    is_finite: Array


@lean_jit
def at_point(problem: Bilevel, x: PyTree, solution: PyTree, theta: PyTree) -> AtPoint:
    """The outer objective, the inner residual and its scale, at `x` as it is.

    The scale is that of `measure`, with the solution in the place of the start.
    """
    outer = jax.value_and_grad(lambda theta: problem.outer_value(x, theta)[0])
    value, direct = outer(theta)
    residual = problem.inner.residual(x, theta)
    solution = tree_where(tree_all_finite(solution), solution, x)
    norm, scale = residual_and_scale(problem.inner, x, solution, theta)
    is_finite = tree_all_finite((value, direct, residual, scale, x, theta))
    norms = (tree_norm(x), tree_norm(theta), tree_norm(direct))
    return AtPoint(value, residual, norm, scale, *norms, is_finite)


def newton_step(
    problem: Bilevel, x: PyTree, theta: PyTree, residual: PyTree, matrix: np.ndarray | None
) -> float:
    """`||A^+ residual||`, to first order the distance to the nearest solution.

    NaN where conjugate gradients (GMRES without symmetry) do not find it.
    """
    if matrix is None:
        length, is_good = _iterated_newton_step(problem, x, theta, residual)
        return float(length) if is_good else float("nan")
    flat = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree_util.tree_leaves(residual)]
    if not (flat and np.all(np.isfinite(matrix))):
        return 0.0 if not flat else float("nan")
    rcond = 4 * np.sqrt(len(matrix)) * float(jnp.finfo(jax.tree_util.tree_leaves(x)[0].dtype).eps)
    return float(np.linalg.norm(np.linalg.lstsq(matrix, np.concatenate(flat), rcond=rcond)[0]))


@lean_jit
def _iterated_newton_step(
    problem: Bilevel, x: PyTree, theta: PyTree, residual: PyTree
) -> tuple[Scalar, Array]:
    matvec = problem.inner.linearise(x, theta).forward
    is_symmetric = problem.inner.is_symmetric
    solver = CG() if is_symmetric else GMRES()
    step = solve_linear(solver, matvec, residual, is_symmetric=is_symmetric)
    # An estimate: one digit is enough, whatever the solver asked of itself.
    is_good = (step.result == RESULTS.successful) | (step.residual < 0.1)
    return tree_norm(step.value), is_good


@lean_jit
def probe(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    dx: PyTree,
    dtheta: PyTree,
    weights: PyTree,
    t: Scalar,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """`L`, `<weights, residual>` and, if there is one, `U` at `(x, theta) + t (dx, dtheta)`.

    With their derivatives in `t` as JAX takes them.
    """
    inner = problem.inner.objective

    def values(t: Scalar) -> Float[Array, " n"]:
        moved_x, moved_theta = tree_axpy(t, dx, x), tree_axpy(t, dtheta, theta)
        value, _ = problem.outer_value(moved_x, moved_theta)
        residual = problem.inner.residual(moved_x, moved_theta)
        found = [value, tree_dot(weights, residual)]
        if inner is not None:
            found.append(inner(moved_x, moved_theta))
        return jnp.stack([a.astype(t.dtype) for a in found])

    return jax.jvp(values, (t,), (jnp.ones_like(t),))


@lean_jit
def constants(
    problem: Bilevel, x: PyTree, theta: PyTree, v: PyTree, start_x: PyTree, start_theta: PyTree
) -> tuple[Scalar, Scalar]:
    """`||B||`, and how fast the adjoint equation changes along `x`.

    The adjoint equation is the stationarity in `x` of `psi = L - <residual, v>`: its
    gradient is `d_x L - A' v`, and the norm of its second derivative, with `v` held, is
    the Lipschitz constant that couples an error of `x` to the adjoint variable.
    """
    _, cross = jax.linearize(lambda theta: problem.inner.residual_here(x, theta), theta)
    transposed = jax.linear_transpose(cross, theta)
    cross_norm = largest_singular_value(cross, lambda r: transposed(r)[0], start_theta)

    def psi(x: PyTree) -> Scalar:
        value, _ = problem.outer_value(x, theta)
        product = tree_dot(problem.inner.residual(x, theta), v)
        return value - product.astype(value.dtype)

    _, second = jax.linearize(jax.grad(psi), x)
    return cross_norm, largest_singular_value(second, second, start_x)
