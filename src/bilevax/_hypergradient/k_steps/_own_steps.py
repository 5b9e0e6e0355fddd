"""K more steps of the inner solver itself, after its result."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from ..._inner._base import AbstractInnerSolver, Counts, run
from ..._loop._scan import repeat
from ..._raise import or_fail
from ..._results import RESULTS
from ..._tree import lax_while_loop, stop_gradient, tree_all_finite, tree_dtype, tree_norm
from .._base import Estimate, HypergradientState, Query, as_stats
from .._call import Call, algorithm_of
from ._series import MOST_LEFT, geometric_remainder, warn_of_what_is_left

Step = Callable[[PyTree], PyTree]

# Every step of these moves x by a smooth function of x and theta: no trial is rejected, and
# none only evaluates. The carry of Optimistix' loop and of ours begins with x.
_OF_OPTIMISTIX = (optx.OptaxMinimiser, optx.Newton, optx.Chord)


def has_own_steps(solver: AbstractInnerSolver | optx.AbstractIterativeSolver) -> bool:
    """Whether more of its own steps can be taken, and differentiated."""
    algorithm = algorithm_of(solver)
    return getattr(algorithm, "steps_by_gradient", isinstance(algorithm, _OF_OPTIMISTIX))


def estimate_by_steps(
    num_steps: int, query: Query, state: HypergradientState
) -> tuple[Estimate, HypergradientState]:
    """The hypergradient through K more steps, and what the steps before would add."""
    problem, condition, theta = query.problem, query.condition, query.theta
    # 1. the solver's own result, a constant
    solver, carry, count = run_to_end(query, state.inner)
    start, rest = carry[0], carry[1:]

    def after(num_steps: int, theta: PyTree, x: PyTree) -> PyTree:
        step = partial(solver.step, condition, theta)
        return repeat(step, (x, *rest), num_steps, "sqrt")

    # 2. K steps from there; their derivative in the start is the adjoint that is left
    def truncated_problem(theta: PyTree, x: PyTree) -> tuple[Array, tuple]:
        x, inner_state = solver.finish(condition, after(num_steps, theta, x))
        value, aux = problem.outer_value(x, theta)
        return value, (aux, x, inner_state)

    fn = jax.value_and_grad(truncated_problem, argnums=(0, 1), has_aux=True)
    (value, (aux, x, inner_state)), (grad, left) = fn(theta, start)
    # 3. one step further back, which is the first one left out
    _, pull = jax.vjp(lambda theta, x: after(1, theta, x)[0], theta, start)
    term, further = pull(left)
    b = jax.grad(lambda x: problem.outer_value(x, theta)[0])(x)
    residual = tree_norm(condition.residual(x, theta))
    estimate = Estimate.of(
        value,
        grad,
        steps_outcome(left, b),
        aux=aux,
        x=x,
        inner_residual=residual,
        stats=as_stats(
            Counts(count + 2 * num_steps + 3, num_steps + 1, num_steps + 1), count + num_steps, 0
        ),
        adjoint_residual=what_is_left(left, b),
        error_estimate=geometric_remainder(term, left, further),
    )
    return estimate, HypergradientState(x, state.v, inner_state)


def solution_by_steps(num_steps: int, query: Query, throw: bool) -> PyTree[Array]:
    """`x` after K more steps, differentiable in theta and the arrays of `condition`."""
    condition, theta = query.condition, query.theta
    fixed_condition, fixed_theta = stop_gradient((condition, theta))
    state = query.inner_solver.init(fixed_condition, stop_gradient(query.start), fixed_theta)
    solver, carry, _ = run_to_end(query, state)
    step = partial(solver.step, condition, theta)
    fixed_step = partial(solver.step, fixed_condition, fixed_theta)
    x, _ = solver.finish(condition, take_steps(step, fixed_step, carry, num_steps, throw))
    result = RESULTS.where(tree_all_finite(x), RESULTS.successful, RESULTS.nonfinite)
    return or_fail(x, result, throw)


def steps_of_call(
    num_steps: int, call: Call, *, keep_x: bool = False
) -> tuple[PyTree[Array], PyTree]:
    """An Optimistix solve with K more turns of its own loop.

    With `keep_x` they move only the derivative of x.
    """
    body, carry = loop_at_end(call)

    def more_steps(cond_fun: Callable, body_fun: Step, init_val: PyTree, **_: object) -> PyTree:
        del cond_fun, init_val
        x = take_steps(body_fun, body, carry, num_steps, True, is_rough=keep_x)[0]
        # The evidence is that of the solve.
        return (derivative_of(x, carry[0]) if keep_x else x, *carry[1:])

    return call.run(call.inputs, more_steps)


def loop_at_end(call: Call) -> tuple[Step, PyTree]:
    """The step of an Optimistix solve and its last carry, both as constants.

    The call is a loop over steps that hands its `while_loop` everything but the inputs.
    """
    seen: list[tuple[Step, PyTree]] = []

    def find_end(cond_fun: Callable, body_fun: Step, init_val: PyTree, **options: int) -> PyTree:
        final = stop_gradient(lax_while_loop(cond_fun, body_fun, init_val, **options))
        seen.append((body_fun, final))
        return final

    call.run(stop_gradient(call.inputs), find_end)
    return seen[0]


def run_to_end(query: Query, state: PyTree) -> tuple[Any, PyTree, Array]:
    """The solver without its stopping test, its last carry as a constant, the steps taken."""
    solver: Any = query.inner_solver
    condition, theta, state = stop_gradient((query.condition, query.theta, state))
    carry = solver.start(condition, stop_gradient(query.start), theta, state)
    carry, count = run(solver, condition, theta, carry)
    carry = stop_gradient(carry)
    return *solver.endless(carry), count


def take_steps(
    step: Step,
    fixed_step: Step,
    carry: PyTree,
    num_steps: int,
    throw: bool,
    *,
    is_rough: bool = False,
) -> PyTree:
    """`num_steps` steps. On the way back their growth is measured, with `fixed_step`.

    Those who know that the result `is_rough` are not warned of it.
    """
    end = repeat(step, carry, num_steps, "sqrt")

    def check(_: Callable, b: PyTree) -> PyTree:
        def fixed_end(x: PyTree) -> PyTree:
            return repeat(fixed_step, (x, *carry[1:]), num_steps, "sqrt")[0]

        (left,) = jax.vjp(fixed_end, carry[0])[1](b)
        if not is_rough:
            b = warn_of_what_is_left(b, what_is_left(left, b))
        return or_fail(b, steps_outcome(left, b), throw)

    # An identity, which custom_linear_solve lets have a transpose of its own and, unlike a
    # custom_vjp, a jvp.
    x = jax.lax.custom_linear_solve(lambda u: u, end[0], lambda _, b: b, check)
    return (_once(x), *end[1:])


@jax.custom_jvp
def _once(x: PyTree) -> PyTree:
    """`x`, which may be differentiated once."""
    return x


@_once.defjvp
def _once_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
    (x,), (dx,) = primals, tangents
    return x, jtu.tree_map(lambda t: t * _one(x).astype(t.dtype), dx)


@jax.custom_jvp
def _one(x: PyTree) -> Array:
    """One, whose derivative is refused: a derivative multiplied by it has none."""
    return jnp.ones((), tree_dtype(x))


@_one.defjvp
def _one_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    raise TypeError(
        "The steps that OneStep, KStep and SAMA differentiate start at a constant x: a second "
        "derivative would leave out that x moves with theta. Use bx.Implicit()."
    )


def derivative_of(moved: PyTree, x: PyTree) -> PyTree:
    """`x`, with the derivative of `moved`."""
    return jtu.tree_map(lambda m, a: a + (m - jax.lax.stop_gradient(m)), moved, x)


def what_is_left(left: PyTree, b: PyTree) -> Array:
    """`||left|| / ||b||`, zero if `b` is zero."""
    norm = tree_norm(b)
    return tree_norm(left) / jnp.where(norm > 0, norm, 1)


def steps_outcome(left: PyTree, b: PyTree) -> RESULTS:
    """`diverged` if the adjoint grows on its way back."""
    grows = what_is_left(left, b) > MOST_LEFT
    result = RESULTS.where(grows, RESULTS.diverged, RESULTS.successful)
    finite = tree_all_finite(jtu.tree_leaves((left, b)))
    return RESULTS.where(finite, result, RESULTS.nonfinite)
