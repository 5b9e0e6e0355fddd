"""Unrolling: the exact derivative of the steps that were taken."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from .._inner._base import AbstractSteppingSolver
from .._inner._optimistix import check_positive
from .._problem import AbstractCondition, start_at
from .._tree import checkpointed_while_loop, stop_gradient
from ._scan import Checkpoints, check_checkpoints, num_checkpoints
from ._through_steps import AbstractThroughSteps, Unrolling, repeat_until_done


class Unrolled(AbstractThroughSteps):
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

    def unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
    ) -> Unrolling:
        carry = solver.start(condition, start_at(x0, theta), theta, stop_gradient(state))
        length = self.num_steps or solver.max_steps
        step = partial(solver.step, condition, theta)
        if solver.is_fixed_length or self.num_steps is not None:
            carry, count = repeat_until_done(solver, step, carry, length, self.checkpoints)
        else:
            carry, count = _repeat_while(solver, step, carry, length, self.checkpoints)
        x, new_state = solver.finish(condition, carry)
        return x, new_state, count, count


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
