"""Unrolling: the exact derivative of the steps that were taken."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._checks import check_positive
from ..._inner._base import AbstractSteppingSolver
from ..._loop._loops import differentiable_loops
from ..._loop._probe import Probe, check_growth, tap
from ..._loop._scan import Checkpoints, check_checkpoints, num_checkpoints
from ..._problem import AbstractCondition, start_at
from ..._tree import checkpointed_while_loop, stop_gradient
from .._base import Estimate, HypergradientState, Query, estimate_of
from .._call import Call
from .._derivative import refuse_backward, refuse_derivative, unmoved
from ._through_steps import AbstractThroughSteps, Unrolling, estimate_through, repeat_until_done
from ._watched import watched_call


class Unrolled(AbstractThroughSteps):
    """The hypergradient of the problem truncated after the steps that were taken.

        L_K(theta) = L(x_K(theta), theta),    x_{k+1} = step(x_k, theta),  x_0 = x0(theta)

    differentiated exactly, through every step and through `x0(theta)`.

    **Arguments:**

    - `num_steps`: the number K of inner steps; by default what the inner solver says. A
        `Descent` takes exactly its `num_steps` updates. A solver that stops by itself is
        differentiated through the steps it took; with `num_steps`, at most that many.
    - `checkpoints`: what is kept for the way back; the rest is computed again.

        | policy | carries kept | steps taken, way forward and back |
        |---|---|---|
        | `"sqrt"` | at most `4 sqrt(K)` | 2K or 3K, and K back |
        | `"all"` | K | 2K, and K back |
        | an integer s | s | at most `(r + 1) K`, and K back, `binom(s + r, r) >= K` |
        | `bx.MemoryBudget(num_bytes)` | as many as fit | the fewest |
        | `"reversible"` | one, and K / 100 words | 2K, and K back |

        `"reversible"` runs `optax.sgd(learning_rate, momentum=...)` backwards exactly, in
        64-bit integers; the words hold the bits that momentum loses. Other optimisers are
        refused, or (Nesterov's, clipping) flagged as `nonfinite`.

    - `max_growth`: the outcome is `exploding` where the adjoint of x grows on the way back
        by more (`Estimate.adjoint_growth`); by default 1e8 in float64 and 1e5 in float32.

    What is differentiated: theta, also where the optimiser's own parameters or `x0` are
    functions of it. After a warm start `x0` is a constant.

    **Cost:** as in the table; a step back takes about a Hessian product and a cross product.
    A carry is `x` and the optimiser's state. A solver that stops by itself keeps
    `sqrt(max_steps)` carries, or as many as are asked for.

    **Derivatives:** `bx.argmin` with `"all"` or `"sqrt"` and a fixed number of steps has
    forward and reverse mode, the other policies reverse mode and forward over reverse;
    `bx.ForwardMode` always has forward mode.

    **Exact when** `L_K` is the problem you mean. As an estimate of the bilevel
    hypergradient its error falls as `K rho^K`, rho the contraction factor of the steps.
    It is flagged when it is not finite or explodes, and as `path_dependent` where x has
    converged and the derivative has not (quasi-Newton steps); `Estimate.is_bilevel` says
    which derivative it is. That costs a linear solve, where x has converged. `bx.argmin` and
    Optimistix' `adjoint=`, which have no estimate to say it, compare as well where the solver
    stops by itself or is quasi-Newton: there such a derivative raises, in both modes.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Unrolled(num_steps=100)
        ```

    Reference: Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based
    hyperparameter optimization", 2017, eq. (9) to (12); Griewank, Walther, "Algorithm 799:
    revolve", 2000, section 2, for the number of steps.
    """

    num_steps: int | None = None
    checkpoints: Checkpoints = "sqrt"
    max_growth: float | None = None

    def __check_init__(self) -> None:
        if self.num_steps is not None:
            check_positive(self.num_steps, "num_steps")
        check_checkpoints(self.checkpoints)
        check_growth(self.max_growth)

    @property
    def differentiates_start(self) -> bool:
        return True

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        call = call.at_most(self.num_steps)
        if call.max_steps is None:
            raise ValueError(
                "To unroll a solve its number of steps must be bounded: pass max_steps=..., or "
                "Unrolled(num_steps=...)."
            )
        loop = partial(_while_loop, checkpoints=self.checkpoints)
        return watched_call(call, partial(call.run, loop=loop))

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        return estimate_through(self.unroll, query, state, self.max_growth)

    def differentiable_estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        stepping = self._check_stepping(query.inner_solver)
        why_not = self._why_not_twice(stepping)
        if why_not is not None:
            return refuse_derivative(estimate_of, (self, query, state), "Unrolled", why_not)
        out = self.estimate(query, unmoved(state, "Unrolled"))
        if self.checkpoints in ("sqrt", "all"):
            return out
        reason = 'that needs the checkpoints "sqrt" or "all"'
        return refuse_backward(out, "Unrolled", reason)

    def _why_not_twice(self, solver: AbstractSteppingSolver) -> str | None:
        """What stands against a derivative of the estimate, if anything does."""
        if self.checkpoints == "reversible":
            return 'the integers of checkpoints="reversible" have none; keep other checkpoints'
        if solver.is_fixed_length or self.num_steps is not None:
            return None
        return (
            "a loop that stops by itself can be gone back through once only. Give the number of "
            "steps, Unrolled(num_steps=...), or use bx.ForwardMode()"
        )

    def unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
        probe: Probe | None = None,
    ) -> Unrolling:
        carry = solver.start(condition, start_at(x0, theta), theta, stop_gradient(state))
        length = self.num_steps or solver.max_steps
        step = partial(solver.step, condition, theta)
        if solver.is_fixed_length or self.num_steps is not None:
            carry, count = repeat_until_done(solver, step, carry, length, self.checkpoints, probe)
        else:
            carry, count = _repeat_while(solver, step, carry, length, self.checkpoints, probe)
        x, new_state = solver.finish(condition, carry)
        return x, new_state, count, count


def _repeat_while(
    solver: AbstractSteppingSolver,
    step: Callable[[PyTree], PyTree],
    carry: PyTree,
    max_steps: int,
    checkpoints: Checkpoints,
    probe: Probe | None,
) -> tuple[PyTree, Array]:
    """As many steps as the solver takes; their number is not known in advance."""
    step = differentiable_loops(step, carry)

    def body(state: tuple) -> tuple:
        x, *others, count = state
        return *step((tap(x, probe), *others)), count + 1

    *carry, count = _while_loop(
        lambda state: jnp.logical_not(solver.is_done(state[:-1])),
        body,
        (*carry, jnp.asarray(0, jnp.int32)),
        max_steps=max_steps,
        checkpoints=checkpoints,
    )
    return tuple(carry), count


def _while_loop(
    cond_fun: Callable,
    body_fun: Callable,
    init_val: PyTree,
    *,
    max_steps: int,
    checkpoints: Checkpoints,
) -> PyTree:
    return checkpointed_while_loop(
        cond_fun,
        body_fun,
        init_val,
        max_steps=max_steps,
        checkpoints=num_checkpoints(checkpoints, body_fun, init_val, max_steps),
    )
