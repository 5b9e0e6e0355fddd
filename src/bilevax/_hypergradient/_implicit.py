"""Implicit differentiation: one adjoint system instead of the steps of the solver."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from .._inner._base import AbstractInnerSolver, Counts
from .._linear import LinearSolution, default_linear_solver, solve_linear, verify
from .._problem import AbstractCondition, Bilevel, objective, start_at
from .._results import RESULTS, first_failure
from .._tree import lax_while_loop, stop_gradient, tree_all_finite, tree_sub, tree_zeros_like
from ._base import AbstractHypergradient, Estimate, HypergradientState, as_stats
from ._implicit_function import attach_derivative


class Implicit(AbstractHypergradient):
    """The hypergradient by the implicit function theorem.

    At the solution `residual(x, theta) = grad_x U = 0` for every theta, hence
    `A D x* + B = 0` with `A = d2_xx U`, `B = d2_x,theta U`, and

        grad = d_theta L - B^T v,    A v = d_x L

    (`A^T v = d_x L` for roots and fixed points, whose derivative is not symmetric). No
    matrix is formed: `A` is linearised once, `B^T v` is one product.

    **Arguments:**

    - `linear_solver`: how the adjoint system is solved: `bx.CG()` (default for minima),
        `bx.GradientDescent(...)`, `bx.Neumann(...)`, or any Lineax solver; by default
        GMRES for roots and fixed points.
    - `preconditioner`: a function `(x, theta)` that returns a function `r -> z`, an
        approximation of `A^{-1} r`, symmetric and positive definite for CG. Not to be
        confused with a warm start, which is a better first guess.
    - `inexact`: say that the inner solve is stopped early on purpose. Its residual is then
        reported and not flagged.

    What is differentiated: theta. The starting point `x0` has no influence on `x*`, and a
    dependence of `x0` on theta is ignored.

    **Cost:** one linearisation of the inner gradient, one Hessian product a step of the
    linear solver and one for the measured residual, one cross product. Memory of a few
    vectors like `x`, whatever the number of inner steps.

    **Exact when** the inner problem and the adjoint system are solved exactly and `A` is
    invertible; the error is of first order in both residuals.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Implicit(bx.CG(rtol=1e-8))
        ```

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", 2016,
    eq. (2) and algorithm 1.
    """

    linear_solver: lx.AbstractLinearSolver | None = None
    preconditioner: Callable[[PyTree, PyTree], Callable[[PyTree], PyTree]] | None = None
    inexact: bool = False

    def __check_init__(self) -> None:
        solver = self.linear_solver
        if not (solver is None or isinstance(solver, lx.AbstractLinearSolver)):
            raise TypeError(
                "`linear_solver` must be bx.CG(...), bx.GradientDescent(...), bx.Neumann(...) "
                f"or a Lineax solver; got {type(solver).__name__}."
            )

    @property
    def differentiates_start(self) -> bool:
        return False

    def init(
        self, problem: Bilevel, inner_solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
    ) -> HypergradientState:
        x = start_at(x0, theta)
        inner = inner_solver.init(problem.inner, x, theta)
        return HypergradientState(x=x, v=tree_zeros_like(x), inner=inner)

    def estimate(
        self,
        problem: Bilevel,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        state: HypergradientState,
    ) -> tuple[Estimate, HypergradientState]:
        condition = problem.inner
        # 1. x solves the inner problem
        inner, inner_state = inner_solver.solve(condition, start_at(x0, theta), theta, state.inner)
        # 2. v solves the adjoint system
        outer_grad = jax.value_and_grad(problem.outer_value, argnums=(0, 1), has_aux=True)
        (value, aux), (grad_x, grad_theta) = outer_grad(inner.x, theta)
        matvec, cross = self.products(condition, inner.x, theta)
        adjoint = self.solve_adjoint(matvec, grad_x, state.v, condition, inner.x, theta)
        # 3. the hypergradient
        grad = tree_sub(grad_theta, cross(adjoint.value))
        result = first_failure(
            self._inner_result(inner.result),
            adjoint.result,
            RESULTS.where(tree_all_finite((value, grad)), RESULTS.successful, RESULTS.nonfinite),
        )
        counts = inner.counts + Counts(gradients=1, hessian=adjoint.num_products, cross=1)
        estimate = Estimate(
            value=value,
            grad=grad,
            aux=aux,
            x=inner.x,
            v=adjoint.value,
            inner_residual=inner.residual,
            inner_tolerance=inner.tolerance,
            adjoint_residual=adjoint.residual,
            result=result,
            stats=as_stats(counts, inner.num_steps, adjoint.num_steps),
        )
        return estimate, HypergradientState(x=inner.x, v=adjoint.value, inner=inner_state)

    def solution(
        self,
        condition: AbstractCondition,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        throw: bool,
    ) -> PyTree[Array]:
        fixed_condition, fixed_theta = stop_gradient((condition, theta))
        x0 = stop_gradient(start_at(x0, theta))
        state = inner_solver.init(fixed_condition, x0, fixed_theta)
        inner, _ = inner_solver.solve(fixed_condition, x0, fixed_theta, state)
        x = or_fail(inner.x, self._inner_result(inner.result), throw)

        def solve(matvec: Callable, b: PyTree) -> PyTree:
            adjoint = self.solve_adjoint(matvec, b, None, fixed_condition, x, fixed_theta)
            return or_fail(adjoint.value, adjoint.result, throw)

        return attach_derivative(
            lambda x, args: args[0].residual(x, args[1]),
            (condition, theta),
            x,
            solve,
            condition.is_symmetric,
        )

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: frozenset[object]
    ) -> PyTree[Array]:
        del tags
        fixed = stop_gradient(inputs)
        x, rest = primal_fn((*fixed, lax_while_loop))
        rest = stop_gradient(rest)
        # Of minimise and least_squares the rewritten residual is a gradient.
        is_symmetric = rewrite_fn.__module__.endswith(("._minimise", "._least_squares"))
        solver = self.linear_solver
        if solver is None:
            solver = default_linear_solver(is_symmetric)

        def solve(matvec: Callable, b: PyTree) -> PyTree:
            adjoint = solve_linear(solver, matvec, b, is_symmetric=is_symmetric)
            adjoint = verify(adjoint, b, matvec(adjoint.value))
            return or_fail(adjoint.value, adjoint.result, True)

        x = attach_derivative(
            lambda x, args: rewrite_fn(x, rest, args), inputs, x, solve, is_symmetric
        )
        return x, rest

    def products(
        self, condition: AbstractCondition, x: PyTree, theta: PyTree
    ) -> tuple[Callable, Callable]:
        """`v -> A^T v` and `v -> B^T v`, linearised once at `x`."""
        inner = objective(condition)
        if inner is None:
            _, vjp = jax.vjp(condition.residual, x, theta)
            return lambda v: vjp(v)[0], lambda v: vjp(v)[1]
        _, matvec = jax.linearize(lambda x: condition.residual(x, theta), x)
        # Forward over reverse: B^T v is the derivative of grad_theta U along v in x, which
        # costs what theta touches and no pass through the rest of U.
        grad_theta = jax.grad(inner, argnums=1)
        return matvec, lambda v: jax.jvp(lambda x: grad_theta(x, theta), (x,), (v,))[1]

    def solve_adjoint(
        self,
        matvec: Callable,
        b: PyTree,
        v0: PyTree | None,
        condition: AbstractCondition,
        x: PyTree,
        theta: PyTree,
    ) -> LinearSolution:
        solver = self.linear_solver
        if solver is None:
            solver = default_linear_solver(condition.is_symmetric)
        preconditioner = None if self.preconditioner is None else self.preconditioner(x, theta)
        adjoint = solve_linear(
            solver, matvec, b, v0, preconditioner, is_symmetric=condition.is_symmetric
        )
        return verify(adjoint, b, matvec(adjoint.value))

    def _inner_result(self, result: RESULTS) -> RESULTS:
        if not self.inexact:
            return result
        return RESULTS.where(result == RESULTS.nonfinite, result, RESULTS.successful)


def or_fail(x: PyTree, result: RESULTS, throw: bool) -> PyTree:
    """`x`; where `result` is a failure an error or, without `throw`, NaN."""
    failed = result != RESULTS.successful
    if throw:
        return result.error_if(x, failed)
    return jax.tree_util.tree_map(lambda a: jnp.where(failed, jnp.nan, a), x)
