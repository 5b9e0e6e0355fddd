"""Truncation: the derivative of the last steps only."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from .._inner._base import AbstractSteppingSolver, run
from .._inner._measured import AbstractMeasuredMinimiser
from .._inner._optimistix import Optimistix, check_positive
from .._problem import AbstractCondition, start_at
from .._tree import checkpointed_while_loop, lax_while_loop, stop_gradient
from ._probe import MAX_GROWTH, check_growth
from ._scan import Checkpoints, check_checkpoints, num_checkpoints
from ._through_steps import AbstractThroughSteps, Unrolling, repeat_until_done
from ._unrolled import Unrolled


class Truncated(AbstractThroughSteps):
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
    max_growth: float = MAX_GROWTH

    def __check_init__(self) -> None:
        check_positive(self.num_steps, "num_steps")
        check_checkpoints(self.checkpoints)
        check_growth(self.max_growth)

    @property
    def differentiates_start(self) -> bool:
        return False

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
                checkpoints=num_checkpoints(self.checkpoints, body_fun, last_steps[0], length),
            )

        return primal_fn((*inputs, differentiate))

    def unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
        probe: Array | None = None,
    ) -> Unrolling:
        if solver.is_fixed_length and solver.max_steps <= self.num_steps:
            whole = Unrolled(checkpoints=self.checkpoints)
            return whole.unroll(condition, solver, x0, theta, state, probe)
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
        carry, num_tail = repeat_until_done(
            solver, step, stop_gradient(carry), self.num_steps, self.checkpoints, probe
        )
        x, new_state = solver.finish(condition, carry)
        return x, new_state, num_head + num_tail, num_tail


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
