"""Whether the derivative of the steps is that of the solution they converged to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from ..._inner._asked import asked_of
from ..._inner._base import Counts, measure
from ..._linear import CG, GMRES, solve_linear, verify
from ..._problem import AbstractCondition, Bilevel
from ..._results import RESULTS
from ..._tree import default_rtol, signs_like, tree_dtype, tree_norm, tree_sub, unbounded

# At a solution `A J + B = 0`, J the derivative of x in theta. Hence for every v
# `J'(A v) = -B'v`, and with `A v = d_x L` the way back through the steps must have found
# `-B'v`. So one linear solve tells the error of the very number that is returned, of slow
# modes, too, which weigh little in `A J w + B w`.

# A hypergradient that is wrong by this part of its size is flagged.
LARGEST_ERROR = 1e-2
# One of a rule that leaves steps out is reported, and flagged where zero would be better.
LARGEST_TRUNCATION = 1.1


class Convergence(NamedTuple):
    """What an `x` after some steps is."""

    residual: Scalar
    is_solution: Bool[Array, ""]
    explained: Scalar  # the relative error of J that belongs to such a residual


class Implied(NamedTuple):
    """The cotangent of theta that belongs to a solution and to the cotangent of x."""

    value: PyTree[Array]  # -B'v
    typical: Scalar  # ||B'v|| of a v of this length and without a special direction
    shift: Scalar  # by how much B'v changes where x errs as much as its derivative may
    is_known: Bool[Array, ""]


def convergence(
    condition: AbstractCondition, solver: Any, x: PyTree, x0: PyTree, theta: PyTree, steps: Array
) -> Convergence:
    """Judge `x` by the solver's own tolerance, or the default one where that is looser.

    Steps that contract by rho leave `rho^K` of the error of x and `K rho^(K-1)` of that of
    its derivative; steps that converge superlinearly the square root. Three and ten are
    for the constants.
    """
    rtol = asked_of(solver, x).rtol.astype(tree_dtype(x))
    seen = measure(condition, x, x0, theta, rtol, None, 0, Counts())
    is_solution = (seen.result == RESULTS.successful) | (seen.result == RESULTS.stalled)
    reached = rtol * seen.residual / jnp.where(seen.tolerance > 0, seen.tolerance, 1)
    linear = 3 * (1 + jnp.asarray(steps, reached.dtype)) * reached
    explained = jnp.maximum(linear, 10 * jnp.sqrt(reached))
    return Convergence(seen.residual, is_solution, explained)


def implied(
    residual: Callable[[PyTree, PyTree], PyTree],
    x: PyTree,
    args: PyTree,
    b: PyTree,
    is_symmetric: bool,
    explained: Scalar,
) -> Implied:
    """What the cotangent `b` of a zero `x` of `residual(x, args)` makes of `args`.

    `explained`: see `Convergence`.
    """
    _, pull = jax.vjp(residual, x, args)
    rtol = 1e-3 * default_rtol(b)
    solver = CG(rtol) if is_symmetric else GMRES(rtol)

    def matvec(v: PyTree) -> PyTree:
        return pull(v)[0]

    found = solve_linear(solver, matvec, b, is_symmetric=is_symmetric)
    product, cross = pull(found.value)
    found = verify(found, b, product)
    signs = jtu.tree_map(signs_like, b)
    length = tree_norm(found.value) / jnp.maximum(tree_norm(signs), 1)
    # Of a factor of the objective B is zero at a solution, and nowhere else.
    moved = jtu.tree_map(lambda a, s: a + explained.astype(a.dtype) * jnp.abs(a) * s, x, signs)
    (elsewhere,) = jax.vjp(lambda args: residual(moved, args), args)[1](found.value)
    return Implied(
        value=jtu.tree_map(jnp.negative, cross),
        typical=length * tree_norm(pull(signs)[1]),
        shift=tree_norm(tree_sub(elsewhere, cross)),
        is_known=(found.residual <= default_rtol(b)) & jnp.isfinite(tree_norm(cross)),
    )


def disagreement(
    found: PyTree, expected: Implied, explained: Scalar, largest: float
) -> tuple[Scalar, Bool[Array, ""]]:
    """`||found - expected||`, and whether it is more than may be.

    Only entries that the inner problem depends on count: what theta changes of the steps
    and not of their end (a step size, the start) is theirs alone.
    """
    gap = jtu.tree_map(
        lambda f, e: jnp.where(e == 0, 0, f.astype(e.dtype) - e), found, expected.value
    )
    error, norm = tree_norm(gap), tree_norm(expected.value)
    most = jnp.maximum(largest * norm, explained * jnp.maximum(norm, expected.typical))
    rounding = 100 * float(jnp.finfo(error.dtype).eps) * tree_norm(found)
    most = jnp.maximum(most, expected.shift) + rounding
    return error, expected.is_known & ~(error <= most)


class Judged(NamedTuple):
    """What a hypergradient through steps is, beside the derivative of these."""

    evidence: dict[str, Array]  # fields of `Estimate`
    result: RESULTS


def judged(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    grad: PyTree,
    at: Convergence,
    largest: float = LARGEST_ERROR,
) -> Judged:
    """The error of a hypergradient through steps, and the flag that belongs to it.

    The error is infinite where it is not known: where `x` is no solution, or the adjoint
    system has none. Where `x` is no solution nothing is computed.
    """
    condition, dtype = problem.inner, at.residual.dtype

    def check() -> tuple[Scalar, Bool[Array, ""], Bool[Array, ""]]:
        outer = jax.grad(lambda x, theta: problem.outer_value(x, theta)[0], (0, 1))
        grad_x, grad_theta = outer(x, theta)
        # Under vmap both branches run: a zero right-hand side takes no steps.
        b = jtu.tree_map(lambda c: jnp.where(at.is_solution, c, 0), grad_x)
        expected = implied(
            condition.residual_here, x, theta, b, condition.is_symmetric, at.explained
        )
        found = tree_sub(grad, grad_theta)
        error, is_wrong = disagreement(found, expected, at.explained, largest)
        return error.astype(dtype), expected.is_known, is_wrong

    def leave() -> tuple[Scalar, Bool[Array, ""], Bool[Array, ""]]:
        return unbounded(jnp.zeros((), dtype)), jnp.array(False), jnp.array(False)

    error, is_known, is_wrong = jax.lax.cond(at.is_solution, check, leave)
    is_known &= at.is_solution
    result = RESULTS.where(is_known & is_wrong, RESULTS.path_dependent, RESULTS.successful)
    evidence = {
        "inner_residual": at.residual,
        "error_estimate": jnp.where(is_known, error, unbounded(error)),
        "is_bilevel": is_known & ~is_wrong,
    }
    return Judged(evidence, result)
