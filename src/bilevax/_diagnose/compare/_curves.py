"""Approximate the solution, or approximate the gradient? Both errors after k inner steps."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ..._hypergradient._base import Query
from ..._hypergradient.implicit._implicit import Implicit
from ..._hypergradient.unrolled._unrolled import Unrolled
from ..._inner._base import AbstractSteppingSolver, InnerSolution, run
from ..._inner._external import wherever
from ..._jit import lean_jit
from ..._linear import CG, GMRES
from ..._problem import AbstractCondition, Bilevel, start_at
from ..._tree import tree_dtype, tree_norm, tree_sub
from ..measure._prospect import relative_difference
from ._record import ErrorCurve

_NUM_POINTS = 12


class StoppedAfter(AbstractSteppingSolver):
    """Another solver, stopped after `num_steps` steps, a traced number: one program for all k."""

    solver: AbstractSteppingSolver
    num_steps: Int[Array, ""]
    max_steps: int

    @property
    def is_fixed_length(self) -> bool:
        return False

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        return self.solver.init(condition, x0, theta)

    def start(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> PyTree[Array]:
        return *self.solver.start(condition, x0, theta, state), jnp.asarray(0, jnp.int32)

    def step(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> PyTree[Array]:
        return *self.solver.step(condition, theta, carry[:-1]), carry[-1] + 1

    def is_done(self, carry: PyTree[Array]) -> Array | bool:
        return (carry[-1] >= self.num_steps) | self.solver.is_done(carry[:-1])

    def finish(self, condition: AbstractCondition, carry: PyTree[Array]) -> tuple[PyTree, PyTree]:
        return self.solver.finish(condition, carry[:-1])

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        carry, _ = run(self, condition, theta, self.start(condition, x0, theta, state))
        x, new_state = self.finish(condition, carry)
        return wherever(x).solve(condition, x, theta, None)[0], new_state


def error_curve(
    problem: Bilevel,
    solver: AbstractSteppingSolver,
    name: str,
    x0: PyTree,
    theta: PyTree,
    num_steps: int,
    x_star: PyTree | None,
    reference: PyTree,
) -> ErrorCurve:
    """Both errors and the distance at about a dozen numbers of steps up to `num_steps`."""
    ks = np.unique(np.round(np.geomspace(1, max(num_steps, 1), _NUM_POINTS)).astype(int))
    implicit, unrolled, distance = [], [], []
    is_differentiable = True
    for k in ks:
        stopped = StoppedAfter(
            solver=solver, num_steps=jnp.asarray(k, jnp.int32), max_steps=num_steps
        )
        x, grad = _implicit_at(problem, stopped, x0, theta)
        implicit.append(relative_difference(grad, reference))
        distance.append(_distance(x, x_star))
        if is_differentiable:
            try:
                grad = _unrolled_at(problem, stopped, x0, theta)
                unrolled.append(relative_difference(grad, reference))
            except (TypeError, ValueError, NotImplementedError):
                is_differentiable = False
    if not is_differentiable:
        unrolled = [float("nan")] * len(ks)
    steps = tuple(int(k) for k in ks)
    return ErrorCurve(name, steps, tuple(implicit), tuple(unrolled), tuple(distance))


@lean_jit
def _implicit_at(
    problem: Bilevel, solver: StoppedAfter, x0: PyTree, theta: PyTree
) -> tuple[PyTree, PyTree]:
    start = start_at(x0, theta)
    tolerance = 1e-10 if tree_dtype(start) == jnp.float64 else 1e-5
    linear_solver = CG(rtol=tolerance) if problem.inner.is_symmetric else GMRES(rtol=tolerance)
    rule = Implicit(linear_solver, inexact=True)
    query = Query(problem, solver, start, theta)
    estimate, _ = rule.estimate(query, rule.init(query))
    return estimate.x, estimate.grad


@lean_jit
def _unrolled_at(problem: Bilevel, solver: StoppedAfter, x0: PyTree, theta: PyTree) -> PyTree:
    rule = Unrolled(num_steps=solver.max_steps)
    query = Query(problem, solver, x0, theta)
    return rule.estimate(query, rule.init(query))[0].grad


def _distance(x: PyTree, x_star: PyTree | None) -> float:
    if x_star is None:
        return float("nan")
    size = float(tree_norm(x_star))
    return float(tree_norm(tree_sub(x, x_star))) / (size if size > 0 else 1.0)
