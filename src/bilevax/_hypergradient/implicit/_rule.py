"""Rules by the implicit function theorem: one linear system, solved, checked, differentiated."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, PyTree, Scalar

from ..._inner._asked import Asked, asked_of
from ..._inner._base import Counts
from ..._linear import (
    DIRECT_SIZE,
    AbstractDirectLinearSolver,
    AbstractIterativeLinearSolver,
    Direct,
    LinearSolution,
    default_linear_solver,
    resume_linear,
    verify,
)
from ..._linear._transposed import transposed
from ..._precondition._base import AbstractPreconditioner
from ..._problem import AbstractCondition, Bilevel, Linearised
from ..._raise import or_fail
from ..._results import RESULTS
from ..._tree import (
    largest_entry,
    stop_gradient,
    tree_axpy,
    tree_size,
    tree_sub,
)
from .._at_solution import AbstractAtSolution, Adjoint, Solved
from .._base import AbstractHypergradient, Estimate, HypergradientState, Query, estimate_of
from .._call import Call
from .._derivative import with_derivative
from .._point import dual_value
from ._adjoint import Reached, direct_at, in_own_scale, reached, with_rtol
from ._evidence import damping_bias
from ._implicit_function import System, attach_derivative
from ._smallest_norm import smallest_norm


class AbstractImplicit(AbstractAtSolution):
    """A rule whose derivative of x* is the solution of linear systems with `A`, of any order."""

    is_implicit: ClassVar[bool] = True

    linear_solver: eqx.AbstractVar[lx.AbstractLinearSolver | None]
    preconditioner: eqx.AbstractVar[AbstractPreconditioner | None]

    def __check_init__(self) -> None:
        solver = self.linear_solver
        if not (solver is None or isinstance(solver, lx.AbstractLinearSolver)):
            raise TypeError(
                "`linear_solver` must be one of bx.linear, such as bx.linear.CG(), or a Lineax "
                f"solver; got {type(solver).__name__}."
            )

    @property
    def shift(self) -> Any:
        """What is added to the diagonal of `A`, or `None`."""
        return None

    def undamped(self) -> "AbstractImplicit":
        """The rule for the matrix itself."""
        return self

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for but the hypergradient."""
        return False

    @property
    def is_default(self) -> bool:
        return self.is_plain and self.linear_solver is None and self.preconditioner is None

    def with_linear_rtol(
        self, rtol: Scalar, condition: AbstractCondition, x: PyTree
    ) -> AbstractHypergradient | None:
        solver = with_rtol(self._solver(condition, x), rtol)
        return dataclasses.replace(self, linear_solver=solver)

    def init(self, query: Query) -> HypergradientState:
        first = super().init(query)
        linear, preconditioner = self._memory(query.condition, first.x)
        return HypergradientState(first.x, first.v, first.inner, linear, preconditioner)

    def adjoint(self, query: Query, solved: Solved, state: HypergradientState) -> Adjoint:
        condition, theta, x, at = query.condition, query.theta, solved.inner.x, solved.at
        memory = (state.linear, state.preconditioner)
        end = reached(at.at.residual, x, query.start, asked_of(query.inner_solver, x))
        adjoint, apply, memory = self._solve(
            at.at, at.grad_x, state.v, condition, x, theta, solved.inner_state, memory, True, end
        )
        # the hypergradient, and the residual of the adjoint system in the same pass
        grad, product = at.hypergradient(adjoint.value)
        damped = self._damped(product, adjoint.value)
        adjoint = verify(adjoint, at.grad_x, damped)
        solver = self._solver(condition, x)
        matvec = self._damped_product(at.at.adjoint)
        if not isinstance(solver, AbstractDirectLinearSolver):
            adjoint = in_own_scale(adjoint, matvec, at.grad_x, damped, x)
        counts = Counts(gradients=1, hessian=adjoint.num_products, cross=1)
        evidence: dict[str, Any] = {
            "inner_tolerance": solved.inner.tolerance,
            "adjoint_residual": adjoint.residual,
            "adjoint_tolerance": adjoint.tolerance,
        }
        if self.shift is not None:
            bias, extra = damping_bias(
                at.at, solver, matvec, self.shift, adjoint.value, condition.is_symmetric
            )
            evidence["damping_bias"] = bias.astype(solved.inner.residual.dtype)
            counts = counts + Counts(hessian=extra, cross=1)
        return Adjoint(
            grad,
            adjoint.value,
            (adjoint.result,),
            counts,
            adjoint.num_steps,
            evidence,
            memory,
            apply,
        )

    def differentiable_estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        return with_derivative(estimate_of, (self, query, state), _derivative_of_estimate)

    def attach(
        self,
        query: Query,
        x: PyTree[Array],
        inner_state: PyTree,
        throw: bool,
        failed: Bool[Array, ""] | None,
    ) -> PyTree[Array]:
        found = (asked_of(query.inner_solver, query.x0), query.x0)
        return self.attached(query.condition, query.theta, x, inner_state, throw, failed, found)

    def attached(
        self,
        condition: AbstractCondition,
        theta: PyTree,
        x: PyTree[Array],
        inner_state: PyTree,
        throw: bool,
        failed: Bool[Array, ""] | None = None,
        found: tuple[Asked, PyTree] | None = None,
    ) -> PyTree[Array]:
        """As `attach`; with `found`, to what accuracy and from where, the derivative fails at
        an x that is no solution.
        """
        args = (condition, theta, self.shift, stop_gradient(x))
        undamped = self.undamped()
        return attach_derivative(
            _damped_residual,
            args,
            x,
            partial(_solve_at, throw=throw, may_choose=True),
            (undamped, condition, x, theta, inner_state, found),
            condition.is_symmetric,
            failed,
        )

    def attach_adjoint(
        self, problem: Bilevel, theta: PyTree, x: PyTree, v: PyTree, inner_state: PyTree
    ) -> PyTree[Array]:
        """The adjoint variable `v`, with its derivative in x, theta and the problem's arrays."""
        undamped = self.undamped()
        return attach_derivative(
            _adjoint_residual,
            (problem, x, theta, self.shift),
            v,
            partial(_solve_at, throw=False, may_choose=False, turns=True),
            (undamped, problem.inner, x, theta, inner_state, None),
            problem.inner.is_symmetric,
        )

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        x, rest = call.constant()

        def residual(x: PyTree, args: tuple) -> PyTree:
            inputs, rest, damping, at = args
            product = call.rewrite_fn(x, rest, inputs)
            return product if damping is None else tree_axpy(damping, tree_sub(x, at), product)

        args = (call.inputs, rest, self.shift, x)
        solve = partial(_solve_alone, is_symmetric=call.is_symmetric)
        return attach_derivative(residual, args, x, solve, self, call.is_symmetric), rest

    def solve_adjoint(
        self,
        matvec: Callable,
        b: PyTree,
        condition: AbstractCondition,
        x: PyTree,
        theta: PyTree,
        inner_state: PyTree = None,
        cross: Callable | None = None,
        end: Reached | None = None,
        *,
        is_transposed: bool,
    ) -> LinearSolution:
        """One system by itself, with `A` or its transpose, its residual measured.

        With `cross`, the product with `B^T`, the solution of smallest norm of a singular one.
        With `end`, where x was found just now, few variables show whether it is a solution.
        """
        at = Linearised(b, matvec, matvec, lambda v: (matvec(v), None))
        if not (self.is_default and condition.is_symmetric):
            cross = None
        rule = self if cross is None else self.of_smallest_norm(b)
        memory = rule._memory(condition, x)
        adjoint, _, _ = rule._solve(
            at, b, None, condition, x, theta, inner_state, memory, is_transposed, end
        )
        damped = self._damped_product(matvec)
        product = damped(adjoint.value)
        adjoint = verify(adjoint, b, product)
        if cross is not None:
            adjoint = smallest_norm(adjoint, matvec, cross, b)
        if isinstance(rule._solver(condition, x), AbstractDirectLinearSolver):
            return adjoint
        return in_own_scale(adjoint, damped, b, product, x)

    def of_smallest_norm(self, b: PyTree) -> "AbstractImplicit":
        """The rule whose direct solver, for few variables, chooses among many solutions."""
        if tree_size(b) > DIRECT_SIZE:
            return self
        return dataclasses.replace(self, linear_solver=Direct(minimum_norm=True))

    def _solve(
        self,
        at: Linearised,
        b: PyTree,
        v0: PyTree | None,
        condition: AbstractCondition,
        x: PyTree,
        theta: PyTree,
        inner_state: PyTree,
        memory: tuple[PyTree, PyTree],
        is_transposed: bool,
        end: Reached | None,
    ) -> tuple[LinearSolution, Callable | None, tuple[PyTree, PyTree]]:
        """The adjoint, the preconditioner of `A`, and what both remember."""
        linear, sketch = memory
        solver = self._solver(condition, x)
        matvec = self._damped_product(at.adjoint)
        apply, extra = None, 0
        if self.preconditioner is not None:
            apply, sketch, extra = self.preconditioner.prepare(
                matvec, condition, x, theta, inner_state, sketch
            )
        used = apply
        if apply is not None and is_transposed and not condition.is_symmetric:
            used = transposed(apply, b)
        is_judged = condition.is_symmetric and not (self.is_inexact or self.shift is not None)
        if is_judged and end is not None and isinstance(solver, AbstractDirectLinearSolver):
            adjoint = direct_at(end, solver, matvec)(b)
        else:
            adjoint, linear = resume_linear(
                solver, matvec, b, v0, used, linear, condition.is_symmetric
            )
        if self.preconditioner is not None:
            sketch = self.preconditioner.learn(sketch, adjoint.num_steps)
        adjoint = eqx.tree_at(lambda s: s.num_products, adjoint, adjoint.num_products + extra)
        return adjoint, apply, (linear, sketch)

    def _solver(self, condition: AbstractCondition, x: PyTree) -> lx.AbstractLinearSolver:
        own = self.linear_solver
        return condition.default_linear_solver(x) if own is None else own

    def _memory(self, condition: AbstractCondition, x: PyTree) -> tuple[PyTree, PyTree]:
        """What the linear solver and the preconditioner remember before the first solve."""
        linear = _memory(self._solver(condition, x), x)
        return linear, None if self.preconditioner is None else self.preconditioner.init(x)

    def _damped(self, product: PyTree, v: PyTree) -> PyTree:
        return product if self.shift is None else tree_axpy(self.shift, v, product)

    def _damped_product(self, matvec: Callable) -> Callable:
        return matvec if self.shift is None else lambda v: self._damped(matvec(v), v)

    def inner_result(self, result: RESULTS) -> RESULTS:
        """What the outcome of the inner solve means to this rule."""
        if not self.is_inexact:
            return result
        return RESULTS.where(result == RESULTS.nonfinite, result, RESULTS.successful)


def _memory(solver: lx.AbstractLinearSolver, x: PyTree) -> PyTree:
    return solver.start(x) if isinstance(solver, AbstractIterativeLinearSolver) else None


def _derivative_of_estimate(
    moving: tuple, still: tuple, dots: tuple, out: tuple[Estimate, HypergradientState]
) -> tuple[Estimate, HypergradientState]:
    """The tangent of an estimate: `x` and `v` move as the zeros of their equations do.

    With `F` the residual, `grad` and `dual_value` are those of `L - v'F`, whose derivative
    in x is the residual of the adjoint system.
    """
    estimate, state = out

    def moved(moving: tuple) -> tuple:
        rule, (problem, _, _, theta), _ = eqx.combine(moving, still)
        # The inner problem is not damped: its solution moves as it does, whatever v solves.
        undamped = rule.undamped()
        x = undamped.attached(problem.inner, theta, estimate.x, state.inner, throw=False)
        v = rule.attach_adjoint(problem, theta, x, estimate.v, state.inner)
        differentiate = jax.value_and_grad(_lagrangian, argnums=2, has_aux=True)
        (dual_value, (value, aux)), grad = differentiate(problem, x, theta, v)
        return value, grad, eqx.filter(aux, eqx.is_inexact_array), x, v, dual_value

    _, tangents = jax.jvp(moved, (moving,), (dots,))
    value, grad, aux, x, v, dual_value = tangents
    nothing = jax.tree_util.tree_map(lambda _: None, out)
    return eqx.tree_at(
        lambda o: (
            o[0].value,
            o[0].grad,
            o[0].aux,
            o[0].x,
            o[0].v,
            o[0].dual_value,
            o[1].x,
            o[1].v,
        ),
        nothing,
        (value, grad, aux, x, v, dual_value, x, v),
        is_leaf=lambda leaf: leaf is None,
    )


def _lagrangian(
    problem: Bilevel, x: PyTree, theta: PyTree, v: PyTree
) -> tuple[Scalar, tuple[Scalar, PyTree]]:
    value, aux = problem.outer_value(x, theta)
    return dual_value(value, v, problem.inner.residual_here(x, theta)), (value, aux)


def _adjoint_residual(v: PyTree, args: tuple) -> PyTree:
    problem, x, theta, damping = args
    residual = jax.grad(lambda x: -_lagrangian(problem, x, theta, v)[0])(x)
    return residual if damping is None else tree_axpy(damping, v, residual)


def _damped_residual(x: PyTree, args: tuple) -> PyTree:
    """The residual plus `damping (x - at)`, which is zero, and has the derivative `damping`."""
    condition, theta, damping, at = args
    residual = condition.residual_here(x, theta)
    return residual if damping is None else tree_axpy(damping, tree_sub(x, at), residual)


def _solve_at(
    memory: tuple,
    system: System,
    b: PyTree,
    *,
    throw: bool,
    may_choose: bool,
    turns: bool = False,
) -> PyTree:
    """Solve with `A` or, where `turns`, with its transpose; what is transposed, the other way."""
    rule, condition, x, theta, inner_state, found = memory
    cross = system.cross if may_choose else None
    is_transposed = system.is_transposed != turns
    end = None
    if found is not None:
        asked, x0 = found
        end = reached(condition.residual_here(x, theta), x, x0, asked)
    adjoint = rule.solve_adjoint(
        system.matvec,
        b,
        condition,
        x,
        theta,
        inner_state,
        cross,
        end,
        is_transposed=is_transposed,
    )
    return solved_or_fail(adjoint, b, throw)


def _solve_alone(
    rule: AbstractImplicit, system: System, b: PyTree, *, is_symmetric: bool
) -> PyTree:
    is_free = rule.is_default and is_symmetric
    solver = (rule.of_smallest_norm(b) if is_free else rule).linear_solver
    if solver is None:
        solver = default_linear_solver(is_symmetric, tree_size(b))
    memory = _memory(solver, b)
    adjoint, _ = resume_linear(solver, system.matvec, b, None, None, memory, is_symmetric)
    adjoint = verify(adjoint, b, system.matvec(adjoint.value))
    if is_free:
        adjoint = smallest_norm(adjoint, system.matvec, system.cross, b)
    return solved_or_fail(adjoint, b, True)


def solved_or_fail(solution: LinearSolution, b: PyTree, throw: bool) -> PyTree:
    """The solution of a system with right-hand side `b`, as in `or_fail`.

    Zero if `b` is zero, whatever the matrix is: a failed element of a batch that nothing
    asks for has no part in the others' derivative.
    """
    is_zero = largest_entry(b) == 0
    value = jax.tree_util.tree_map(lambda a: jnp.where(is_zero, 0, a), solution.value)
    result = RESULTS.where(is_zero, RESULTS.successful, solution.result)
    return or_fail(value, result, throw)
