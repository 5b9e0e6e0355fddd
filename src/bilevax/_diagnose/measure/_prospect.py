"""The compiled looks at a problem that `recommend` decides from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from ..._hypergradient._base import AbstractHypergradient, Estimate
from ..._hypergradient._entry import hypergradient
from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver, residual_and_scale, run
from ..._inner._external import wherever
from ..._jit import lean_jit
from ..._loop._budget import num_bytes
from ..._problem import Bilevel, start_at
from ..._tree import tree_norm, tree_sub
from ._differences import gaussian


class Inner(NamedTuple):
    """One inner solve."""

    x: PyTree[Array]
    relative_residual: float  # against the scale of `measure`
    num_steps: int
    contraction: float  # of the residual, a step; NaN where it was not seen
    cross_norm: float  # ||B' u|| / ||u|| for a random u
    direct_norm: float  # ||d_theta L||
    moves_steps: bool  # whether the first step changes with theta
    state_bytes: int  # of one carry of the solver
    is_finite: bool


def look_at_inner(
    problem: Bilevel, solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
) -> Inner:
    """Solve the inner problem once, and look at what the solution depends on."""
    solver, start = solver.before(problem.inner, start_at(x0, theta), theta)
    looked = _inner(problem, solver, start, theta, gaussian(start, 1), gaussian(theta, 2))
    x, residual, scale, num_steps, shrunk, cross, direct, moved = looked
    numbers = [float(a) for a in (residual, scale, direct)]
    return Inner(
        x=x,
        relative_residual=float(residual) / float(scale) if float(scale) > 0 else float(residual),
        num_steps=int(num_steps),
        contraction=_contraction(*shrunk),
        cross_norm=float(cross),
        direct_norm=float(direct),
        moves_steps=bool(moved > 0),
        state_bytes=_state_bytes(problem, solver, start, theta),
        is_finite=bool(np.all(np.isfinite(numbers))),
    )


@lean_jit
def _inner(
    problem: Bilevel,
    solver: AbstractInnerSolver,
    x0: PyTree,
    theta: PyTree,
    direction_x: PyTree,
    direction_theta: PyTree,
) -> tuple:
    condition = problem.inner
    state = solver.init(condition, x0, theta)
    moved, shrunk = jnp.zeros(()), (None, None, 0)
    if isinstance(solver, AbstractSteppingSolver) and solver.steps_by_gradient:
        carry = solver.start(condition, x0, theta, state)
        half, num_half = run(solver, condition, theta, carry, solver.max_steps // 2)
        rest = solver.max_steps - solver.max_steps // 2
        carry, num_rest = run(solver, condition, theta, half, rest)
        x, num_steps = solver.finish(condition, carry)[0], num_half + num_rest
        before = tree_norm(condition.residual(solver.finish(condition, half)[0], theta))
        shrunk = (before, tree_norm(condition.residual(x, theta)), rest)
    else:
        solution, _ = solver.solve(condition, x0, theta, state)
        x, num_steps = solution.x, solution.num_steps
    if isinstance(solver, AbstractSteppingSolver):
        moved = _moved_by(solver, problem, x0, theta, state, direction_theta)
    residual, scale = residual_and_scale(condition, x, x0, theta)
    _, cross = jax.vjp(lambda theta: condition.residual(x, theta), theta)
    cross_norm = tree_norm(cross(direction_x)[0]) / tree_norm(direction_x)
    direct = jax.grad(lambda theta: problem.outer_value(x, theta)[0])(theta)
    return x, residual, scale, num_steps, shrunk, cross_norm, tree_norm(direct), moved


def _contraction(before: Scalar | None, after: Scalar | None, num_steps: int) -> float:
    """Of a residual in a step; NaN where it was not looked at, or zero before."""
    if before is None or after is None or not float(before) > 0:
        return float("nan")
    return (float(after) / float(before)) ** (1 / int(num_steps))


def _moved_by(
    solver: AbstractSteppingSolver,
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    state: PyTree,
    direction: PyTree,
) -> Scalar:
    """How much the first step changes where theta moves along `direction`."""

    def first_step(theta: PyTree) -> PyTree:
        carry = solver.start(problem.inner, x0, theta, state)
        return solver.finish(problem.inner, solver.step(problem.inner, theta, carry))[0]

    return tree_norm(jax.jvp(first_step, (theta,), (direction,))[1])


def _state_bytes(problem: Bilevel, solver: AbstractInnerSolver, x0: PyTree, theta: PyTree) -> int:
    """Of one carry; 0 for a solver without steps."""
    if not isinstance(solver, AbstractSteppingSolver):
        return 0
    carry = jax.eval_shape(
        lambda: jax.tree_util.tree_leaves(
            solver.start(problem.inner, x0, theta, solver.init(problem.inner, x0, theta))
        )
    )
    return num_bytes(carry)


def look_at_gradient(
    problem: Bilevel, x: PyTree, theta: PyTree, rule: AbstractHypergradient
) -> Estimate:
    """The hypergradient of an implicit rule at `x`, whatever its residual."""
    return hypergradient(problem, x, theta, inner_solver=wherever(x), rule=rule, throw=False)[0]


def relative_difference(a: PyTree, b: PyTree) -> float:
    """`||a - b|| / ||b||`; zero over zero is zero."""
    difference, size = float(tree_norm(tree_sub(a, b))), float(tree_norm(b))
    return difference / size if size > 0 else (0.0 if difference == 0 else np.inf)
