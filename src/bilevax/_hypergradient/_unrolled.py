"""Unrolling: the exact derivative of the steps that were taken."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from .._inner._base import AbstractInnerSolver, AbstractSteppingSolver, Counts, run
from .._inner._measured import AbstractMeasuredMinimiser
from .._inner._optimistix import Optimistix, check_positive
from .._problem import AbstractCondition, Bilevel, start_at
from .._results import RESULTS
from .._tree import (
    checkpointed_while_loop,
    lax_while_loop,
    stop_gradient,
    tree_all_finite,
    tree_norm,
)
from ._base import AbstractHypergradient, Estimate, HypergradientState, as_stats
from ._implicit import or_fail
from ._scan import Checkpoints, check_checkpoints, num_checkpoints, repeat


class Unrolled(AbstractHypergradient):
    """The hypergradient of the problem truncated after the steps that were taken.

        L_K(theta) = L(x_K(theta), theta),    x_{k+1} = step(x_k, theta),  x_0 = x0(theta)

    differentiated exactly, through every step and through `x0(theta)`.

    **Arguments:**

    - `num_steps`: the number K of inner steps; by default what the inner solver says. A
        `Descent` takes exactly its `num_steps` updates. A solver that stops by itself is
        differentiated through the steps it took; with `num_steps`, at most that many.
    - `checkpoints`: "sqrt" keeps about `2 sqrt(K)` carries and recomputes the rest once,
        "all" keeps K, an integer that many segments.

    What is differentiated: theta, also where the optimiser's own parameters or `x0` are
    functions of it. After a warm start `x0` is a constant.

    **Cost:** K steps forward, K again for the recomputation, and K steps back, each about
    a Hessian product and a cross product. Memory of `2 sqrt(K)` carries (`x` and the
    optimiser's state).

    **Exact when** `L_K` is the problem you mean. As an estimate of the bilevel
    hypergradient its error falls as `K rho^K`, rho the contraction factor of the steps.
    It is flagged only when it is not finite; the inner residual is reported.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Unrolled(num_steps=100)
        ```

    Reference: Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based
    hyperparameter optimization", 2017, eq. (9) to (12).
    """

    num_steps: int | None = None
    checkpoints: Checkpoints = "sqrt"

    def __check_init__(self) -> None:
        if self.num_steps is not None:
            check_positive(self.num_steps, "num_steps")
        check_checkpoints(self.checkpoints)

    @property
    def differentiates_start(self) -> bool:
        return True

    def init(
        self, problem: Bilevel, inner_solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
    ) -> HypergradientState:
        return _init(self, problem, inner_solver, x0, theta)

    def estimate(
        self,
        problem: Bilevel,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        state: HypergradientState,
    ) -> tuple[Estimate, HypergradientState]:
        return estimate_through(self._unroll, problem, inner_solver, x0, theta, state)

    def solution(
        self,
        condition: AbstractCondition,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        throw: bool,
    ) -> PyTree[Array]:
        return _solution(self._unroll, self, condition, inner_solver, x0, theta, throw)

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: frozenset[object]
    ) -> PyTree[Array]:
        max_steps = inputs[5]
        if self.num_steps is not None:
            max_steps = self.num_steps if max_steps is None else min(max_steps, self.num_steps)
        if max_steps is None:
            raise ValueError(
                "To unroll a solve its number of steps must be bounded: pass max_steps=..., or "
                "Unrolled(num_steps=...)."
            )
        inputs = (*inputs[:5], max_steps, *inputs[6:])
        adjoint = optx.RecursiveCheckpointAdjoint(num_checkpoints(self.checkpoints, max_steps))
        return adjoint.apply(primal_fn, rewrite_fn, inputs, tags)

    def _unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, Array, Array]:
        carry = solver.start(condition, start_at(x0, theta), theta, stop_gradient(state))
        length = self.num_steps or solver.max_steps
        step = partial(solver.step, condition, theta)
        if solver.is_fixed_length or self.num_steps is not None:
            carry, count = _repeat_until_done(solver, step, carry, length, self.checkpoints)
        else:
            carry, count = _repeat_while(solver, step, carry, length, self.checkpoints)
        x, new_state = solver.finish(condition, carry)
        return x, new_state, count, count


class Truncated(AbstractHypergradient):
    """As `Unrolled`, but only the last steps are differentiated.

    With N inner steps, `x_{N-K}` is taken as a constant, and the hypergradient is that of
    the K steps from there. At a solution it equals the K-term Neumann series.

    **Arguments:**

    - `num_steps`: the number K of differentiated steps. If the solver takes no more than
        K of a fixed number of steps, everything is differentiated, as by `Unrolled`.
    - `checkpoints`: as in `Unrolled`.

    What is differentiated: theta where it enters the last K steps; a dependence of `x0`
    on theta is ignored. Solvers with a line search or a trust region are refused: near the
    solution their last steps are rejected trials, on which theta has no influence.

    **Cost:** N steps forward (a solver that stops by itself runs twice, the first time to
    learn N), K recomputed, K back. Memory of `2 sqrt(K)` carries.

    **Exact when** never; the error falls as `rho^K`.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Truncated(num_steps=20)
        ```

    Reference: Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel
    optimization", 2019, section 3.
    """

    num_steps: int
    checkpoints: Checkpoints = "sqrt"

    def __check_init__(self) -> None:
        check_positive(self.num_steps, "num_steps")
        check_checkpoints(self.checkpoints)

    @property
    def differentiates_start(self) -> bool:
        return False

    def init(
        self, problem: Bilevel, inner_solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
    ) -> HypergradientState:
        return _init(self, problem, inner_solver, x0, theta)

    def estimate(
        self,
        problem: Bilevel,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        state: HypergradientState,
    ) -> tuple[Estimate, HypergradientState]:
        return estimate_through(self._unroll, problem, inner_solver, x0, theta, state)

    def solution(
        self,
        condition: AbstractCondition,
        inner_solver: AbstractInnerSolver,
        x0: PyTree,
        theta: PyTree,
        throw: bool,
    ) -> PyTree[Array]:
        return _solution(self._unroll, self, condition, inner_solver, x0, theta, throw)

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: frozenset[object]
    ) -> PyTree[Array]:
        del rewrite_fn, tags
        _check_every_step_moves(inputs[1])
        # 1. All steps as constants, remembering where the last K begin. `primal_fn` is a
        # loop over steps that hands its `while_loop` everything but the inputs.
        last_steps: list[PyTree] = []

        def find_start(
            cond_fun: Callable, body_fun: Callable, init_val: PyTree, *, max_steps: int | None
        ) -> PyTree:
            counted = lax_while_loop(
                lambda c: cond_fun(c[0]),
                lambda c: (body_fun(c[0]), c[1] + 1),
                (init_val, jnp.asarray(0, jnp.int32)),
                max_steps=max_steps,
            )
            final, count = counted
            start = jax.lax.fori_loop(
                0, jnp.maximum(count - self.num_steps, 0), lambda _, c: body_fun(c), init_val
            )
            last_steps.append(stop_gradient(start))
            return final

        primal_fn((*stop_gradient(inputs), find_start))

        # 2. The last K again, differentiated.
        def differentiate(
            cond_fun: Callable, body_fun: Callable, init_val: PyTree, *, max_steps: int | None
        ) -> PyTree:
            del init_val
            length = self.num_steps if max_steps is None else min(self.num_steps, max_steps)
            return checkpointed_while_loop(
                cond_fun,
                body_fun,
                last_steps[0],
                max_steps=length,
                checkpoints=num_checkpoints(self.checkpoints, length),
            )

        return primal_fn((*inputs, differentiate))

    def _unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, Array, Array]:
        if solver.is_fixed_length and solver.max_steps <= self.num_steps:
            return Unrolled(None, self.checkpoints)._unroll(condition, solver, x0, theta, state)
        if isinstance(solver, Optimistix):
            _check_every_step_moves(solver.solver)
        fixed_condition, fixed_theta = stop_gradient((condition, theta))
        x0 = stop_gradient(start_at(x0, theta))
        start = solver.start(fixed_condition, x0, fixed_theta, stop_gradient(state))
        total = solver.max_steps
        if not solver.is_fixed_length:
            _, total = run(solver, fixed_condition, fixed_theta, start)
        head = jnp.maximum(total - self.num_steps, 0)
        carry, num_head = run(solver, fixed_condition, fixed_theta, start, head)
        step = partial(solver.step, condition, theta)
        carry, num_tail = _repeat_until_done(
            solver, step, stop_gradient(carry), self.num_steps, self.checkpoints
        )
        x, new_state = solver.finish(condition, carry)
        return x, new_state, num_head + num_tail, num_tail


def estimate_through(
    unroll: Callable[..., tuple[PyTree, PyTree, Array, Array]],
    problem: Bilevel,
    inner_solver: AbstractInnerSolver,
    x0: PyTree,
    theta: PyTree,
    state: HypergradientState,
) -> tuple[Estimate, HypergradientState]:
    """The estimate of a rule that differentiates `x` as a function of theta."""

    def truncated_problem(theta: PyTree) -> tuple[Array, Any]:
        x, inner_state, num_steps, num_back = unroll(
            problem.inner, inner_solver, x0, theta, state.inner
        )
        value, aux = problem.outer_value(x, theta)
        return value, (aux, x, inner_state, num_steps, num_back)

    try:
        (value, rest), grad = jax.value_and_grad(truncated_problem, has_aux=True)(theta)
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise TypeError(
            f"A step of the inner solver {_name(inner_solver)} contains a loop of unknown length "
            "(a line search, or a linear solve by CG), which cannot be differentiated backwards. "
            "Use bx.Implicit(), or an inner solver without it: bx.LBFGS(), bx.NewtonCG(dense=True) "
            "for few variables, optax.lbfgs(learning_rate, linesearch=None)."
        ) from error
    aux, x, inner_state, num_steps, num_back = rest
    residual = tree_norm(problem.inner.residual(x, theta))
    result = RESULTS.where(tree_all_finite((value, grad)), RESULTS.successful, RESULTS.nonfinite)
    # Going back through a step recomputes it (one gradient) and transposes its derivative.
    counts = Counts(gradients=num_steps + num_back + 2, hessian=num_back, cross=num_back)
    estimate = Estimate(
        value=value,
        grad=grad,
        aux=aux,
        x=x,
        v=None,
        inner_residual=residual,
        inner_tolerance=jnp.full_like(residual, jnp.inf),
        adjoint_residual=jnp.full_like(residual, jnp.nan),
        result=result,
        stats=as_stats(counts, num_steps, 0),
    )
    return estimate, HypergradientState(x=x, v=None, inner=inner_state)


def _init(
    rule: AbstractHypergradient,
    problem: Bilevel,
    inner_solver: AbstractInnerSolver,
    x0: PyTree,
    theta: PyTree,
) -> HypergradientState:
    _check_stepping(rule, inner_solver)
    x = start_at(x0, theta)
    return HypergradientState(x=x, v=None, inner=inner_solver.init(problem.inner, x, theta))


def _solution(
    unroll: Callable[..., tuple[PyTree, PyTree, Array, Array]],
    rule: AbstractHypergradient,
    condition: AbstractCondition,
    inner_solver: AbstractInnerSolver,
    x0: PyTree,
    theta: PyTree,
    throw: bool,
) -> PyTree[Array]:
    _check_stepping(rule, inner_solver)
    state = inner_solver.init(condition, start_at(x0, theta), theta)
    x, *_ = unroll(condition, inner_solver, x0, theta, state)
    result = RESULTS.where(tree_all_finite(x), RESULTS.successful, RESULTS.nonfinite)
    return or_fail(x, result, throw) if throw else x


def _check_stepping(rule: AbstractHypergradient, inner_solver: AbstractInnerSolver) -> None:
    if not isinstance(inner_solver, AbstractSteppingSolver):
        raise TypeError(
            f"`{type(rule).__name__}` differentiates the steps of the inner solver, and "
            f"{type(inner_solver).__name__} has none that JAX can see. Use bx.Implicit(), or an "
            "inner solver such as bx.Descent(optimizer, num_steps=...)."
        )


def _name(inner_solver: AbstractInnerSolver) -> str:
    return type(getattr(inner_solver, "solver", inner_solver)).__name__


def _check_every_step_moves(solver: optx.AbstractIterativeSolver) -> None:
    inner = getattr(solver, "solver", solver)  # BestSoFarMinimiser and its siblings
    search = getattr(inner, "search", None)
    searches = not (search is None or isinstance(search, optx.LearningRate))
    if searches or isinstance(inner, AbstractMeasuredMinimiser):
        raise TypeError(
            f"`Truncated` differentiates the last steps, and those of {type(inner).__name__} may "
            "be rejected trials of its search, which do not depend on theta. Use bx.Implicit() "
            "or bx.Unrolled(), or a solver without search such as bx.Descent(optax.adam(...), "
            "num_steps=...)."
        )


def _repeat_until_done(
    solver: AbstractSteppingSolver,
    step: Callable[[PyTree], PyTree],
    carry: PyTree,
    length: int,
    checkpoints: Checkpoints,
) -> tuple[PyTree, Array]:
    """`length` steps of a scan; those after the solver is done change nothing."""
    if solver.is_fixed_length:
        return repeat(step, carry, length, checkpoints), jnp.asarray(length, jnp.int32)

    def guarded(state: tuple) -> tuple:
        carry, count = state
        # A cond and not a where: the step of a converged solver may be 0/0, and its
        # derivative would be NaN through a where.
        return jax.lax.cond(
            solver.is_done(carry), lambda: (carry, count), lambda: (step(carry), count + 1)
        )

    return repeat(guarded, (carry, jnp.asarray(0, jnp.int32)), length, checkpoints)


def _repeat_while(
    solver: AbstractSteppingSolver,
    step: Callable[[PyTree], PyTree],
    carry: PyTree,
    max_steps: int,
    checkpoints: Checkpoints,
) -> tuple[PyTree, Array]:
    """As many steps as the solver takes; their number is not known in advance."""
    return checkpointed_while_loop(
        lambda state: jnp.logical_not(solver.is_done(state[0])),
        lambda state: (step(state[0]), state[1] + 1),
        (carry, jnp.asarray(0, jnp.int32)),
        max_steps=max_steps,
        checkpoints=num_checkpoints(checkpoints, max_steps),
    )
