"""Newton's method on x and v together, until the hypergradient stands still."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from ..._problem import Bilevel
from ..._results import RESULTS
from ..._tree import signs_like, tree_norm, tree_size, tree_sub, tree_zeros_like, unbounded
from .._point import point
from ._adjoint import newton_steps

_ROUNDING = 10.0


class Refined(eqx.Module):
    """A hypergradient after some refinements, and how far the last one moved it.

    `grad` is taken at `(x, v)`; `change` is its distance from the one before, which is
    the error of that one to first order, and bounds the error of `grad` where Newton's
    method contracts.
    """

    # the last evaluation
    x: PyTree[Array]
    v: PyTree[Array]
    grad: PyTree[Array]
    has_grad: Bool[Array, ""]  # false before the first evaluation, if none was given
    change: Scalar
    last_change: Scalar
    inner_residual: Scalar
    adjoint_residual: Scalar
    step: Scalar  # of x to the next evaluation
    is_contracting: Bool[Array, ""]  # residual and step have halved, or are down to rounding
    # the next one
    next_x: PyTree[Array]
    # reported
    num_refinements: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    result: RESULTS


def start(x: PyTree, v: PyTree, grad: PyTree | None, theta: PyTree) -> Refined:
    """Before the first refinement; `grad` is the hypergradient so far, if there is one."""
    is_known = jnp.array(grad is not None)
    grad = tree_zeros_like(theta) if grad is None else grad
    of_x, of_theta = unbounded(tree_norm(x)), unbounded(tree_norm(theta))
    zero = jnp.zeros((), jnp.int32)
    measured = (is_known, of_theta, of_theta, of_x, of_x, of_x, jnp.array(True))
    return Refined(x, v, grad, *measured, x, zero, zero, zero, RESULTS.successful)


def refine(
    problem: Bilevel,
    theta: PyTree,
    s: Refined,
    solver: lx.AbstractLinearSolver,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
) -> Refined:
    """One refinement.

    At x, both corrections: `A dx = grad_x U`, `A dv = d_x L - A v`. The hypergradient is
    taken at `(x, v + dv)`, whose adjoint system is solved; the next one will be at
    `x - dx`. Two refinements from an inexact `(x, v)` give the hypergradient at the
    Newton point of both, whose error is of second order.
    """
    is_symmetric = problem.inner.is_symmetric
    x = s.next_x
    here = point(problem, x, theta)
    at, b = here.at, here.grad_x
    rho = tree_sub(b, at.adjoint(s.v))
    steps = newton_steps(solver, at, rho, preconditioner, is_symmetric)
    v = jtu.tree_map(jnp.add, s.v, steps.dv)
    grad, product = here.hypergradient(v)
    change = tree_norm(tree_sub(grad, s.grad))
    norm_b = tree_norm(b)
    adjoint_residual = tree_norm(tree_sub(b, product))
    residual = tree_norm(at.residual)
    # A gradient is a difference of terms of the size ||A|| ||x||: this much of it is
    # rounding. The size of A from one product with a pseudo-random vector, which estimates
    # its Frobenius norm.
    probe = jtu.tree_map(signs_like, x)
    size_A = jnp.sqrt(tree_size(x)) * tree_norm(at.forward(probe)) / tree_norm(probe)
    eps = float(jnp.finfo(residual.dtype).eps)
    is_rounding = residual <= _ROUNDING * eps * size_A * tree_norm(x)
    # Larger terms may cancel within the user's function, of which nothing is known here: a
    # step that moves no variable by more than this is not to be halved.
    moves = jtu.tree_map(
        lambda d, a: jnp.any(jnp.abs(d) > eps ** (2 / 3) * jnp.abs(a)), steps.dx, x
    )
    is_rounding |= ~jnp.any(jnp.array(jtu.tree_leaves(moves), bool))
    # The residual alone sees the stiff directions: in a soft one x may still have to move.
    step = tree_norm(steps.dx)
    is_shorter = (residual <= 0.5 * s.inner_residual) & (step <= 0.5 * s.step)
    return Refined(
        x=x,
        v=v,
        grad=grad,
        has_grad=jnp.array(True),
        change=jnp.where(s.has_grad, change, unbounded(change)),
        last_change=s.change,
        inner_residual=residual,
        adjoint_residual=adjoint_residual / jnp.where(norm_b > 0, norm_b, 1),
        step=step,
        is_contracting=is_shorter | is_rounding,
        next_x=tree_sub(x, steps.dx),
        num_refinements=s.num_refinements + 1,
        num_steps=s.num_steps + steps.num_steps,
        num_products=s.num_products + steps.num_products + 3,
        result=steps.result,
    )


def refine_twice(
    problem: Bilevel,
    theta: PyTree,
    first: Refined,
    solver: lx.AbstractLinearSolver,
    preconditioner: Callable[[PyTree], PyTree] | None,
) -> Refined:
    """At x with v corrected, then at the Newton point; `change` is from `first.grad`."""

    def step(_: Array, s: Refined) -> Refined:
        new = refine(problem, theta, s, solver, preconditioner)
        failed = s.result != RESULTS.successful
        return eqx.tree_at(lambda r: r.result, new, RESULTS.where(failed, s.result, new.result))

    last = jax.lax.fori_loop(0, 2, step, first)
    change = tree_norm(tree_sub(last.grad, first.grad))
    return eqx.tree_at(lambda r: r.change, last, change)
