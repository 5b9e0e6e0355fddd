"""A hypergradient to a relative error that the user chose."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from ..._checks import check_tolerance
from ..._inner._base import AbstractInnerSolver, Counts, InnerSolution
from ..._precondition._base import AbstractPreconditioner, as_preconditioner
from ..._problem import AbstractCondition
from ..._results import RESULTS
from ..._tree import tree_dtype, tree_norm, tree_size
from .._base import Estimate, HypergradientState, Query, as_stats
from .._point import dual_value
from ._adjoint import DENSE_EVIDENCE, evidence_solver
from ._evidence import bound_at
from ._refine import Refined, refine, start
from ._rule import AbstractImplicit

_MAX_REFINEMENTS = 6
_MAX_ATTEMPTS = 4
_MAX_DENSE_STEPS = 200
# Beyond this accuracy a tolerance only asks for rounding errors.
_FLOOR = 10.0
# The loosest: far from a solution Newton's method says nothing of the error.
_LOOSEST = 0.1


class _Found(NamedTuple):
    """A hypergradient to accuracy, and what it took."""

    refined: Refined
    inner: InnerSolution  # the last inner solve
    inner_state: PyTree
    tolerances: Array  # for the next outer step: of the inner solve, of the systems
    preconditioner: PyTree
    counts: Counts
    num_inner_steps: Int[Array, ""]
    num_adjoint_steps: Int[Array, ""]
    result: RESULTS


class _Carry(NamedTuple):
    out: _Found
    is_accurate: Bool[Array, ""]
    num_attempts: Int[Array, ""]


def _first_tolerances(rtol: Any, x: PyTree) -> Array:
    """Of the inner solve and of the linear systems.

    One Newton step squares the error of x, so that the root of the accuracy will do; the
    error of v enters as it is.
    """
    dtype = tree_dtype(x)
    rtol = jnp.asarray(rtol, dtype)
    floor = _FLOOR * float(jnp.finfo(dtype).eps)
    return jnp.stack([jnp.clip(jnp.sqrt(rtol), floor, _LOOSEST), jnp.clip(0.1 * rtol, floor, 0.1)])


class Accurate(AbstractImplicit):
    """The hypergradient to an accuracy that you choose: the error itself, not residuals.

    `||grad - exact|| <= rtol ||grad|| + atol`, or flagged: `inaccurate` where that was not
    reached, `stalled` where the precision of the numbers does not give it. An inner solve, then
    Newton steps on x and v together, until the hypergradient moves by no more than that; where
    Newton's method does not contract, the inner solve goes on to a tighter tolerance. The
    tolerances of the inner solve and of the linear systems are coupled, tightened where needed
    and loosened again from one outer step to the next; `inner_tolerance` and
    `adjoint_tolerance` report them.

    **Arguments:**

    - `rtol`, `atol`: relative and absolute error of the hypergradient.
    - `linear_solver`, `preconditioner`: as in `bx.Implicit`. With at most 256 variables the
        steps are taken with a factorisation of `A`.

    In `bx.argmin`, and as an adjoint of Optimistix, where no hypergradient is known, the rule is
    `bx.Implicit`.

    **Cost:** two Newton steps at least, each of a linearisation and two linear solves.

    **Exact when** the Newton steps converge: then to `rtol`, by the size of the last one.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Accurate(1e-3)
        ```

    Reference: Newton's method on `(grad_x U, A v - d_x L) = 0`.
    """

    rtol: float | Scalar
    atol: float | Scalar = 0.0
    linear_solver: lx.AbstractLinearSolver | None = None
    preconditioner: AbstractPreconditioner | None = eqx.field(
        default=None, converter=as_preconditioner
    )

    def __check_init__(self) -> None:
        check_tolerance("Accurate", rtol=self.rtol, atol=self.atol)

    def with_linear_rtol(self, rtol: Scalar, condition: AbstractCondition, x: PyTree) -> None:
        del rtol, condition, x  # it chooses itself

    def init(self, query: Query) -> HypergradientState:
        first = super().init(query)
        return dataclasses.replace(first, tolerances=_first_tolerances(self.rtol, first.x))

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        problem, inner_solver, _, theta = query
        inner_solver = _dense_if_small(inner_solver, query.start)
        query = query._replace(inner_solver=inner_solver, x0=query.start)
        found = _hypergradient_to_accuracy(self, query, state)
        s = found.refined
        value, aux = problem.outer_value(s.x, theta)
        residual = problem.inner.residual_here(s.x, theta)
        bound, counts = bound_at(problem, s.x, s.next_x, theta, s.v)
        counts = found.counts + counts
        estimate = Estimate.of(
            value,
            s.grad,
            found.result,
            aux=aux,
            x=s.x,
            v=s.v,
            inner_residual=s.inner_residual,
            inner_tolerance=found.inner.tolerance,
            stats=as_stats(counts, found.num_inner_steps, found.num_adjoint_steps),
            adjoint_residual=s.adjoint_residual,
            adjoint_tolerance=state.tolerances[1].astype(s.adjoint_residual.dtype),
            error_estimate=s.change.astype(s.inner_residual.dtype),
            dual_value=dual_value(value, s.v, residual),
            **bound,
        )
        new_state = HypergradientState(
            s.x, s.v, found.inner_state, state.linear, found.preconditioner, found.tolerances
        )
        return estimate, new_state


def _hypergradient_to_accuracy(rule: Accurate, query: Query, state: HypergradientState) -> _Found:
    """The hypergradient to `||error|| <= rtol ||grad|| + atol`, or flagged.

    By how far it moves, which is the error of the one before the last.
    """

    def attempt(carry: _Carry) -> _Carry:
        return _attempt(rule, query, carry)

    def is_running(carry: _Carry) -> Bool[Array, ""]:
        is_finite = carry.out.result != RESULTS.nonfinite
        return ~carry.is_accurate & (carry.num_attempts < _MAX_ATTEMPTS) & is_finite

    blank = _blank(query, state)
    return jax.lax.while_loop(is_running, attempt, blank).out


def _dense_if_small(solver: AbstractInnerSolver, x: PyTree) -> AbstractInnerSolver:
    """Newton's method with a factorised Hessian, which no condition number slows down.

    Of fewer steps: each of the attempts goes on where the last one stopped, and what such steps
    do not solve by the hundred, more of them do not either.
    """
    return solver if tree_size(x) > DENSE_EVIDENCE else solver.factorised(_MAX_DENSE_STEPS)


def _blank(query: Query, state: HypergradientState) -> _Carry:
    problem, inner_solver, x, theta = query
    struct = jax.eval_shape(lambda: inner_solver.solve(problem.inner, x, theta, state.inner)[0])
    inner = jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), struct)
    zero = jnp.zeros((), jnp.int32)
    refined = start(x, state.v, None, theta)
    out = _Found(
        refined,
        inner,
        state.inner,
        state.tolerances,
        state.preconditioner,
        Counts(),
        zero,
        zero,
        RESULTS.successful,
    )
    return _Carry(out, jnp.array(False), zero)


def _attempt(rule: Accurate, query: Query, carry: _Carry) -> _Carry:
    accuracy, preconditioner = (rule.rtol, rule.atol), rule.preconditioner
    (problem, inner_solver, _, theta), out = query, carry.out
    inner_rtol, linear_rtol = out.tolerances[0], out.tolerances[1]
    # 1. x to the tolerance of this attempt, from the best point so far
    told = inner_solver.with_rtol(inner_rtol)
    solver = inner_solver if told is None else told
    inner, inner_state = solver.solve(problem.inner, out.refined.x, theta, out.inner_state)
    # 2. Newton steps on x and v
    is_symmetric = problem.inner.is_symmetric
    newton = evidence_solver(rule.linear_solver, inner.x, is_symmetric, linear_rtol)
    apply, memory, extra = None, out.preconditioner, jnp.zeros((), jnp.int32)
    if preconditioner is not None:
        matvec = problem.inner.linearise(inner.x, theta).forward
        apply, memory, extra = preconditioner.prepare(
            matvec, problem.inner, inner.x, theta, inner_state, memory
        )

    def is_running(s: Refined) -> Bool[Array, ""]:
        is_useful = s.is_contracting & (s.result == RESULTS.successful)
        is_open = (s.num_refinements < 2) | ~_is_accurate(s, accuracy)
        return is_useful & is_open & (s.num_refinements < _MAX_REFINEMENTS)

    refined = jax.lax.while_loop(
        is_running,
        lambda s: refine(problem, theta, s, newton, apply),
        start(inner.x, out.refined.v, None, theta),
    )
    # 3. the verdict, and tolerances for the next attempt or the next outer step
    is_good = _is_accurate(refined, accuracy) & refined.is_contracting
    is_good = is_good & (refined.result == RESULTS.successful) & (refined.num_refinements >= 2)
    if preconditioner is not None:
        memory = preconditioner.learn(memory, refined.num_steps // refined.num_refinements)
    counts = Counts(
        gradients=refined.num_refinements,
        hessian=refined.num_products + extra,
        cross=refined.num_refinements,
    )
    new = _Found(
        refined=refined,
        inner=inner,
        inner_state=inner_state,
        tolerances=_next_tolerances(out.tolerances, refined, is_good, accuracy),
        preconditioner=memory,
        counts=out.counts + inner.counts + counts,
        num_inner_steps=out.num_inner_steps + inner.num_steps,
        num_adjoint_steps=out.num_adjoint_steps + refined.num_steps,
        result=_result(refined, inner, is_good),
    )
    return _Carry(new, is_good, carry.num_attempts + 1)


def _wanted(s: Refined, accuracy: tuple[Any, Any]) -> Scalar:
    rtol, atol = (jnp.asarray(a, s.change.dtype) for a in accuracy)
    return rtol * tree_norm(s.grad) + atol


def _is_accurate(s: Refined, accuracy: tuple[Any, Any]) -> Bool[Array, ""]:
    return s.change <= _wanted(s, accuracy)


def _next_tolerances(
    tolerances: Array, s: Refined, is_good: Array, accuracy: tuple[Any, Any]
) -> Array:
    """Tighter after a failure, looser where much less error was left than was allowed."""
    is_easy = is_good & (s.num_refinements <= 2) & (s.change <= 0.01 * _wanted(s, accuracy))
    factor = jnp.where(is_easy, 3.0, jnp.where(is_good, 1.0, 0.01)).astype(tolerances.dtype)
    floor = _FLOOR * float(jnp.finfo(tolerances.dtype).eps)
    return jnp.clip(factor * tolerances, floor, _LOOSEST)


def _result(s: Refined, inner: InnerSolution, is_good: Array) -> RESULTS:
    # What the changes tell: standing still they are rounding errors.
    is_floor = s.is_contracting & (s.change > 0.3 * s.last_change)
    late = RESULTS.where(is_floor, RESULTS.stalled, RESULTS.inaccurate)
    late = RESULTS.where(s.is_contracting, late, RESULTS.inner_not_converged)
    result = RESULTS.where(s.result == RESULTS.successful, late, s.result)
    is_finite = jnp.isfinite(tree_norm(s.grad)) & (inner.result != RESULTS.nonfinite)
    result = RESULTS.where(is_finite, result, RESULTS.nonfinite)
    return RESULTS.where(is_good, RESULTS.successful, result)
