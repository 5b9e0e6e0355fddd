"""The hypergradient where the inner problem has many solutions."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, PyTree, Scalar

from ..._checks import check_count
from ..._inner._asked import asked_of
from ..._inner._base import Counts
from ..._linear import (
    AbstractDirectLinearSolver,
    Direct,
    LinearSolution,
    solve_linear,
    verify,
)
from ..._linear._minres import MINRES
from ..._problem import AbstractCondition, Linearised
from ..._raise import or_fail
from ..._results import RESULTS
from ..._tree import (
    default_rtol,
    flat_to_tree,
    is_bounded,
    map_rows,
    signs_like,
    stop_gradient,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_sub,
)
from .._at_solution import AbstractAtSolution, Adjoint, Solved
from .._base import Estimate, HypergradientState, Query, estimate_of
from .._call import Call
from .._derivative import refuse_derivative
from .._point import Point
from ._adjoint import DENSE_EVIDENCE, Reached, direct_at, first_of_batch, reached, strictest
from ._implicit import Implicit
from ._tangent import tangent_columns

# A null space smaller than this part of a random vector is rounding.
_IS_NULL = 1e-5


class MinimumNorm(AbstractAtSolution):
    """The hypergradient of the response of smallest norm, for singular inner problems.

    Where the inner problem has many solutions `A = d2_xx U` is singular. Let the solutions
    move smoothly with theta; then the tangent system `A D x* = -B` has solutions, but the
    adjoint system `A v = d_x L` in general has none. Of all responses the one of smallest
    norm, `D x* = -A^+ B`, is what gradient descent from a fixed start follows, and

        grad = d_theta L - B^T A^+ d_x L.

    - For at most `max_tangents` entries of theta the tangent systems are solved, one a
      column, in one batch. They are consistent, so that conjugate gradients are safe.
    - For more, `v = A^+ d_x L` by `bx.linear.MINRES(minimum_norm=True)` or, for few inner
      variables, `bx.linear.Direct(minimum_norm=True)`. That the tangent system is consistent is
      then probed: `B^T` must not see the null space of `A`, tried on the part of `d_x L`
      and of a fixed pseudo-random vector in it.

    If the tangent system is inconsistent there is no differentiable selection of
    solutions, and the outcome is `singular`. Negative curvature is flagged as always. The
    objective that this is the hypergradient of is that of the solution nearest to the
    start of the inner solve: `DoubleLoop(start="cold")` makes it independent of the path.

    **Arguments:**

    - `max_tangents`: the largest number of entries of theta for tangent systems.
    - `inexact`: as in `Implicit`.

    **Cost:** for few outer variables as many solves as entries of theta, else two; a
    Hessian product a step, and two or three cross products.

    **Exact when** the solutions form a smooth manifold along which `A` has constant rank
    (Morse-Bott), and x is one of them; where `A` is invertible it agrees with `Implicit`.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(  # one equation for two unknowns
            inner=lambda x, theta: (x[0] + 2 * x[1] - theta) ** 2,
            outer=lambda x, theta: jnp.sum((x - 1.0) ** 2),
        )
        bx.hypergradient(problem, jnp.zeros(2), jnp.array(1.0), rule=bx.MinimumNorm())[0].grad
        ```

    Reference: Arbel and Mairal, "Non-convex bilevel games with critical point selection
    maps", 2022 (arXiv:2207.04888), proposition 1: `d_theta phi = -A^+ B` for the selection.
    """

    is_implicit: ClassVar[bool] = True

    max_tangents: int = 32
    inexact: bool = False

    def __check_init__(self) -> None:
        check_count("MinimumNorm", max_tangents=self.max_tangents)

    def adjoint(self, query: Query, solved: Solved, state: HypergradientState) -> Adjoint:
        del state
        condition, theta, x, at = query.condition, query.theta, solved.inner.x, solved.at
        is_small = tree_size(theta) <= self.max_tangents
        differentiate = _by_tangents if is_small else _by_adjoint
        asked = asked_of(query.inner_solver, x)
        end = None if self.inexact else reached(at.at.residual, x, query.start, asked)
        grad, v, systems, is_consistent = differentiate(condition, at, x, theta, end)
        return Adjoint(
            grad,
            v,
            (
                first_of_batch(systems),
                RESULTS.where(is_consistent, RESULTS.successful, RESULTS.singular),
            ),
            Counts(1, jnp.sum(systems.num_products), systems.residual.shape[0]),
            jnp.sum(systems.num_steps),
            {
                "inner_tolerance": solved.inner.tolerance,
                "adjoint_residual": jnp.max(systems.residual),
                "adjoint_tolerance": _tolerance(systems, x),
            },
        )

    @property
    def is_inexact(self) -> bool:
        return self.inexact

    def inner_result(self, result: RESULTS) -> RESULTS:
        return super().inner_result(result) if self.inexact else result

    def differentiable_estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        reason = (
            "the inner problem has many solutions, and how the response of smallest norm itself "
            "moves depends on the path. Regularise the inner objective"
        )
        return refuse_derivative(estimate_of, (self, query, state), "MinimumNorm", reason)

    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        x = super().solution(query, throw)
        condition, solver = query.condition, self._solver(query)
        fixed, *at_point = stop_gradient((condition, x, query.theta))
        at = fixed.linearise(*at_point)
        _, is_consistent = _solve_and_probe(solver, at, [], stop_gradient(x), condition, None)
        result = RESULTS.where(is_consistent, RESULTS.successful, RESULTS.singular)
        return or_fail(x, result, throw)

    def attach(
        self,
        query: Query,
        x: PyTree[Array],
        inner_state: PyTree,
        throw: bool,
        failed: Bool[Array, ""] | None,
    ) -> PyTree[Array]:
        rule = Implicit(self._solver(query), inexact=self.inexact)
        return rule.attach(query, x, inner_state, throw, failed)

    def _solver(self, query: Query) -> lx.AbstractLinearSolver:
        return _minimum_norm_solver(query.condition.is_symmetric, tree_size(query.start))

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        rule = Implicit(_minimum_norm_solver(call.is_symmetric, size=None))
        return rule.attach_to_call(call)


Found = tuple[PyTree, PyTree | None, LinearSolution, Bool[Array, ""]]


def _tolerance(systems: LinearSolution, x: PyTree) -> Scalar:
    """What the residuals had to reach: of systems without a solution, their part in the range."""
    least = strictest(systems.tolerance)
    assert least is not None
    return jnp.where(is_bounded(least), least, jnp.asarray(default_rtol(x), least.dtype))


def _by_tangents(
    condition: AbstractCondition,
    at: Point,
    x: PyTree,
    theta: PyTree,
    end: Reached | None,
) -> Found:
    """`d_theta L + (D x*)^T d_x L` from the columns of `D x*`: no `v`."""
    size, is_symmetric = tree_size(x), condition.is_symmetric
    dense = size <= DENSE_EVIDENCE
    iterative = condition.default_linear_solver(x)
    solver = Direct(minimum_norm=True) if dense else iterative
    solve_one = _solver_at(solver, at.at.forward, is_symmetric, end)

    def solve(b: PyTree) -> LinearSolution:
        found = solve_one(b)
        found = verify(found, b, at.at.forward(found.value))
        if not dense:
            return found
        # Least squares accepts every system; a tangent has to solve it.
        is_open = (found.result == RESULTS.successful) & ~(found.residual <= default_rtol(x))
        result = RESULTS.where(is_open, RESULTS.singular, found.result)
        return eqx.tree_at(lambda s: s.result, found, result)

    columns, systems = tangent_columns(condition, at.at, x, theta, solve)
    products = jax.vmap(lambda column: tree_dot(column, at.grad_x))(columns)
    grad = jtu.tree_map(jnp.add, at.grad_theta, flat_to_tree(products, theta))
    return grad, None, systems, jnp.array(True)


def _solver_at(
    solver: lx.AbstractLinearSolver,
    matvec: Callable[[PyTree], PyTree],
    is_symmetric: bool,
    end: Reached | None,
) -> Callable[[PyTree], LinearSolution]:
    """The solver of the systems at x; with `end`, it sees whether x is a solution."""
    if isinstance(solver, AbstractDirectLinearSolver) and is_symmetric and end is not None:
        return direct_at(end, solver, matvec)
    return lambda b: solve_linear(solver, matvec, b, is_symmetric=is_symmetric)


def _by_adjoint(
    condition: AbstractCondition,
    at: Point,
    x: PyTree,
    theta: PyTree,
    end: Reached | None,
) -> Found:
    """`d_theta L - B^T v`, `v = A^+ d_x L`, and whether that means anything."""
    solver = _minimum_norm_solver(condition.is_symmetric, tree_size(x))
    systems, is_consistent = _solve_and_probe(solver, at.at, [at.grad_x], x, condition, end)
    v = jtu.tree_map(lambda a: a[0], systems.value)
    return at.hypergradient(v)[0], v, systems, is_consistent


def _solve_and_probe(
    solver: lx.AbstractLinearSolver,
    at: Linearised,
    sides: list[PyTree],
    x: PyTree,
    condition: AbstractCondition,
    end: Reached | None,
) -> tuple[LinearSolution, Bool[Array, ""]]:
    """`A^+ b` for the given sides and a pseudo-random one; is `B^T` blind to their null parts?

    `b - A A^+ b` is the part of `b` in the null space of `A`. The tangent system
    `A D x* = -B` has a solution exactly if `B^T` vanishes there.
    """
    pattern = jtu.tree_map(signs_like, x)
    batch = jtu.tree_map(lambda *a: jnp.stack(a), *sides, pattern)

    solve_one = _solver_at(solver, at.adjoint, condition.is_symmetric, end)

    def solve(b: PyTree) -> tuple[LinearSolution, Scalar, Scalar]:
        found = solve_one(b)
        product = at.adjoint(found.value)
        null = tree_sub(b, product)
        return verify(found, b, product), tree_norm(null), tree_norm(at.both(null)[1])

    systems, size_null, seen = map_rows(solve, batch, at.both, x)
    norm_B = tree_norm(at.both(pattern)[1]) / tree_norm(pattern)
    size_b = jax.vmap(tree_norm)(batch)
    is_null = size_null > _IS_NULL * size_b
    is_blind = seen <= _blindness(solver, x) * norm_B * size_null
    return systems, jnp.all(is_blind | ~is_null)


def _blindness(solver: lx.AbstractLinearSolver, x: PyTree) -> float:
    """What `B^T` may see of a null vector: rounding, or the tolerance of the solve."""
    if isinstance(solver, AbstractDirectLinearSolver):
        return 10 * float(jnp.finfo(tree_dtype(x)).eps) ** 0.5
    return 100 * default_rtol(x)


def _minimum_norm_solver(is_symmetric: bool, size: int | None) -> lx.AbstractLinearSolver:
    if size is not None and size <= DENSE_EVIDENCE:
        return Direct(minimum_norm=True)
    return MINRES(minimum_norm=True) if is_symmetric else lx.LSMR(rtol=1e-8, atol=1e-8)
