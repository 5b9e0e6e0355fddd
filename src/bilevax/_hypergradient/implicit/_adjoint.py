"""Adjoint systems: which solver, from which start, and what is measured of the answer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Int, PyTree, Scalar

from ..._inner._asked import Asked
from ..._inner._own_scale import norm, own_magnitude
from ..._linear import (
    AbstractDirectLinearSolver,
    Direct,
    LinearSolution,
    default_linear_solver,
    solve_linear,
)
from ..._linear._transposed import transposed
from ..._problem import Linearised
from ..._results import RESULTS, first_failure
from ..._tree import default_rtol, is_bounded, map_rows, signs_like, tree_size, tree_sub

# Up to this size evidence comes from a dense factorisation: it is exact, and its products
# are one matrix product.
DENSE_EVIDENCE = 256
# Of the effect of the variables on the outer objective, what a solve may leave out.
_LEFT = 1e-2
# How much more than the accuracy asked for in one norm of all entries. Conjugate gradients
# to 1e-3 leave up to 1e-2 on a ridge whose features differ in scale by 30.
_COARSER = 100.0
# Of a product, relative to the sizes of its factors.
_ROUNDING = 10.0
# Of x, what a Newton step may still move: so many times the root of the default accuracy, 2.5e-3
# in float64. Hypergradients that are wrong by more than 1 % move x by more.
_FAR = 2.5
# A tolerance of so many times the default leaves x far from a solution on purpose.
_LOOSE = 10.0


def with_rtol(solver: Any, rtol: Scalar | float) -> Any:
    """A linear solver with another relative tolerance, if it has one."""
    if not hasattr(solver, "rtol"):
        return solver
    return eqx.tree_at(lambda s: s.rtol, solver, rtol, is_leaf=lambda leaf: leaf is None)


def evidence_solver(
    solver: lx.AbstractLinearSolver | None, x: PyTree, is_symmetric: bool, rtol: Scalar | float
) -> lx.AbstractLinearSolver:
    """What solves for the Newton steps behind an error estimate."""
    if tree_size(x) <= DENSE_EVIDENCE:
        return Direct()
    if solver is None:
        solver = default_linear_solver(is_symmetric, tree_size(x))
    return with_rtol(solver, rtol)


def in_own_scale(
    adjoint: LinearSolution,
    matvec: Callable[[PyTree], PyTree],
    b: PyTree[Array],
    product: PyTree[Array],
    x: PyTree[Array],
) -> LinearSolution:
    """`adjoint`, flagged where its residual hides an unsolved variable of another scale.

    The residual of a linear solver is one norm of all entries, and the largest entries of
    `b` belong to the smallest variables. In the units of x, `||x r|| / ||x b||` entry by entry
    is what is left of the effect of relative changes of x. What is flagged is gross, so that
    a solve to few digits in one unit for all is not. Where `x b` says nothing, because the
    outer objective does not see the variables that are large, the terms of `A v` do, for
    one more product.
    """
    if adjoint.tolerance is None:  # a number of steps was asked for
        return adjoint
    x, b, residual, v = jax.lax.stop_gradient((x, b, tree_sub(b, product), adjoint.value))

    def weighed(a: PyTree) -> Scalar:
        return norm(jtu.tree_map(jnp.multiply, x, a))

    left, size = weighed(residual), weighed(b)
    may_leave = jnp.maximum(_LEFT, _COARSER * adjoint.tolerance)
    rounding = _ROUNDING * float(jnp.finfo(left.dtype).eps) * norm(x) * norm(b)
    is_open = (adjoint.result == RESULTS.successful) & (left > may_leave * size + rounding)
    is_open &= is_bounded(adjoint.tolerance)  # in the least-squares sense it may be anything

    def terms() -> Scalar:
        return weighed(matvec(jtu.tree_map(lambda a: a * signs_like(a), v)))

    size = jnp.maximum(size, jax.lax.cond(is_open, terms, lambda: size))
    is_hidden = is_open & (left > may_leave * size + rounding)
    result = RESULTS.where(is_hidden, RESULTS.adjoint_not_converged, adjoint.result)
    num_products = adjoint.num_products + is_open.astype(jnp.int32)
    return eqx.tree_at(lambda s: (s.result, s.num_products), adjoint, (result, num_products))


class Reached(NamedTuple):
    """Where an inner solve ended."""

    residual: PyTree[Array]
    size: PyTree[Array]  # the magnitudes of x
    asked: Asked


def reached(residual: PyTree, x: PyTree, x0: PyTree, asked: Asked) -> Reached:
    """What shows whether `x`, found from `x0`, is a solution."""
    return Reached(residual, own_magnitude(x, x0), asked)


def direct_at(
    end: Reached, solver: AbstractDirectLinearSolver, matvec: Callable[[PyTree], PyTree]
) -> Callable[[PyTree], LinearSolution]:
    """`b -> A^-1 b`; `inner_not_converged` where x is too far from a solution.

    A residual is small where x is off in a soft direction or, if a row holds terms of other
    variables that are far larger, in a small variable. The Newton step tells how far x is,
    and the factorisation has it for nothing. Where much less was asked for than by default,
    x may be far on purpose.
    """
    factorised = solver.factorise(matvec, end.size)
    default = default_rtol(end.size)
    is_far = factorised.relative_step(end.residual, end.size) > _FAR * default**0.5
    loose = _LOOSE * default
    is_far &= end.asked.rtol <= loose
    is_far &= end.asked.atol <= loose * factorised.size_of_product(end.size)

    def solve(b: PyTree[Array]) -> LinearSolution:
        found = factorised.solve(b)
        is_hidden = is_far & (found.result == RESULTS.successful)
        result = RESULTS.where(is_hidden, RESULTS.inner_not_converged, found.result)
        return eqx.tree_at(lambda s: s.result, found, result)

    return solve


class NewtonSteps(eqx.Module):
    """The corrections `A dx = residual` of x and `A^T dv = rho` of v."""

    dx: PyTree[Array]
    dv: PyTree[Array]
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    result: RESULTS


def newton_steps(
    solver: lx.AbstractLinearSolver,
    at: Linearised,
    rho: PyTree[Array],
    preconditioner: Callable[[PyTree], PyTree] | None,
    is_symmetric: bool,
) -> NewtonSteps:
    """Both corrections; of a symmetric system as one batch of two right-hand sides."""
    if is_symmetric:
        pair = jtu.tree_map(lambda a, b: jnp.stack([a, b]), at.residual, rho)

        def solve(b: PyTree) -> LinearSolution:
            return solve_linear(solver, at.adjoint, b, None, preconditioner)

        solved = map_rows(solve, pair, at.adjoint, rho)
        first, second = (jtu.tree_map(lambda a, i=i: a[i], solved) for i in range(2))
    else:
        first = solve_linear(
            solver, at.forward, at.residual, None, preconditioner, is_symmetric=False
        )
        turned = None if preconditioner is None else transposed(preconditioner, rho)
        second = solve_linear(solver, at.adjoint, rho, None, turned, is_symmetric=False)
    return NewtonSteps(
        dx=first.value,
        dv=second.value,
        num_steps=first.num_steps + second.num_steps,
        num_products=first.num_products + second.num_products,
        result=_softened(first_failure(first.result, second.result)),
    )


def _softened(result: RESULTS) -> RESULTS:
    """A correction at the precision floor is no failure: there is nothing to correct."""
    return RESULTS.where(result == RESULTS.stalled, RESULTS.successful, result)


def strictest(tolerance: Array | None) -> Scalar | None:
    """The tolerance that all systems of a batch had to reach, if anything was asked for."""
    return None if tolerance is None else jnp.min(tolerance)


def first_of_batch(solutions: LinearSolution) -> RESULTS:
    """The first failure in a batch of systems."""
    worst = jnp.argmax(solutions.result != RESULTS.successful)
    return jtu.tree_map(lambda code: code[worst], solutions.result)
