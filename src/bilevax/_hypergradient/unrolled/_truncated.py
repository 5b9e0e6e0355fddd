"""Truncation: the derivative of the last steps only."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from ..._checks import check_positive, check_tolerance
from ..._inner._base import AbstractSteppingSolver, Counts, run
from ..._inner._measured import AbstractMeasuredMinimiser
from ..._loop._adaptive import repeat_until_negligible
from ..._loop._probe import Probe, check_growth
from ..._loop._scan import Checkpoints, check_checkpoints, num_checkpoints
from ..._problem import AbstractCondition, start_at
from ..._results import RESULTS
from ..._tree import checkpointed_while_loop, lax_while_loop, stop_gradient, tree_norm
from .._base import Estimate, HypergradientState, Query
from .._call import Call
from ._agreement import LARGEST_ERROR, LARGEST_TRUNCATION
from ._through_steps import (
    AbstractThroughSteps,
    Own,
    Unrolling,
    estimate_through,
    repeat_until_done,
)
from ._unrolled import Unrolled
from ._watched import watched_call


class Truncated(AbstractThroughSteps):
    """As `Unrolled`, but only the last steps are differentiated.

    With N inner steps, `x_{N-K}` is taken as a constant, and the hypergradient is that of
    the K steps from there. At a solution it equals the K-term Neumann series.

    **Arguments:**

    - `num_steps`: the number K of differentiated steps. If the solver takes no more than
        K of a fixed number of steps, everything is differentiated, as by `Unrolled`.
        `"auto"`: as many as matter. The way back ends where the adjoint of x has fallen to
        `rtol` of what it was, and what was cut off, extrapolated, is below `rtol` of the
        result. K is in `stats["num_cross_products"]`.
    - `rtol`: the accuracy that `"auto"` aims at.
    - `checkpoints`: as in `Unrolled`; `"auto"` has its own, `2 sqrt(N)` carries.
    - `max_growth`: as in `Unrolled`.

    What is differentiated: theta where it enters the last K steps; a dependence of `x0`
    on theta is ignored. Solvers with a line search or a trust region are refused: near the
    solution their last steps are rejected trials, on which theta has no influence.

    **Evidence.** `"auto"` fills `error_estimate`: the larger of what was cut off and of the
    error of the Jacobian after N steps, from the increments `||J_{k+1} u - J_k u||` along one
    direction u, and flags as `inaccurate` what is not below `rtol`. Where x converges, but
    the increments do not fall (the curse of unrolling), the outcome is `burn_in`.

    **Cost:** N steps forward (a solver that stops by itself runs twice, the first time to
    learn N), K recomputed, K back. Memory of `2 sqrt(K)` carries. `"auto"`: N steps with a
    tangent forward, each about two gradients more.

    **Exact when** never; the error falls as `rho^K`, rho the contraction factor of the
    steps.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Truncated(num_steps=20)
        rule = bx.Truncated("auto", rtol=1e-3)
        ```

    Reference: Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel
    optimization", 2019, section 3; Scieur, Gidel, Bertrand, Pedregosa, "The curse of
    unrolling: rate of differentiating through optimization", 2022, for the burn-in.
    """

    num_steps: int | Literal["auto"]
    checkpoints: Checkpoints = "sqrt"
    max_growth: float | None = None
    rtol: float = 1e-3

    def __check_init__(self) -> None:
        if isinstance(self.num_steps, str):
            if self.num_steps != "auto":
                raise ValueError(
                    "Truncated(num_steps) must be a number of steps or 'auto'; got "
                    f"{self.num_steps!r}."
                )
        else:
            check_positive(self.num_steps, "num_steps")
        check_tolerance("Truncated", rtol=self.rtol)
        check_checkpoints(self.checkpoints)
        check_growth(self.max_growth)

    @property
    def differentiates_start(self) -> bool:
        return False

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        _check_every_step_moves(call.solver)
        return watched_call(call, partial(self._run, call), self._largest_error)

    def _run(self, call: Call, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """A call of Optimistix, its last steps differentiated."""
        num_last = self.num_steps
        if not isinstance(num_last, int):
            return call.run(inputs, self._while_loop)
        # 1. All steps as constants, remembering where the last K begin. The call is a
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
                0, jnp.maximum(count - num_last, 0), lambda _, c: body_fun(c), init_val
            )
            last_steps.append(stop_gradient(start))
            return final

        call.run(stop_gradient(inputs), find_start)

        # 2. The last K again, differentiated.
        def differentiate(
            cond_fun: Callable, body_fun: Callable, init_val: PyTree, *, max_steps: int | None
        ) -> PyTree:
            del init_val
            length = num_last if max_steps is None else min(num_last, max_steps)
            return checkpointed_while_loop(
                cond_fun,
                body_fun,
                last_steps[0],
                max_steps=length,
                checkpoints=num_checkpoints(self.checkpoints, body_fun, last_steps[0], length),
            )

        return call.run(inputs, differentiate)

    def differentiable_estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        if self._takes_all(self._check_stepping(query.inner_solver)):
            whole = Unrolled(checkpoints=self.checkpoints, max_growth=self.max_growth)
            return whole.differentiable_estimate(query, state)
        return super().differentiable_estimate(query, state)

    def _takes_all(self, solver: AbstractSteppingSolver) -> bool:
        num_last = self.num_steps
        return isinstance(num_last, int) and solver.is_fixed_length and solver.max_steps <= num_last

    def unroll(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
        probe: Probe | None = None,
    ) -> Unrolling:
        num_last = self.num_steps
        if self._takes_all(solver):
            whole = Unrolled(checkpoints=self.checkpoints)
            return whole.unroll(condition, solver, x0, theta, state, probe)
        _check_every_step_moves(solver.algorithm)
        fixed_condition, fixed_theta = stop_gradient((condition, theta))
        x0 = stop_gradient(start_at(x0, theta))
        start = solver.start(fixed_condition, x0, fixed_theta, stop_gradient(state))
        step = partial(solver.step, condition, theta)
        if isinstance(num_last, int):
            total = solver.max_steps
            if not solver.is_fixed_length:
                _, total = run(solver, fixed_condition, fixed_theta, start)
            head = jnp.maximum(total - num_last, 0)
            carry, num_head = run(solver, fixed_condition, fixed_theta, start, head)
            carry, num_back = repeat_until_done(
                solver, step, stop_gradient(carry), num_last, self.checkpoints, probe
            )
            count = num_head + num_back
        else:
            carry, count = repeat_until_negligible(
                step, solver.is_done, stop_gradient(start), solver.max_steps, self.rtol, probe
            )
            num_back = count  # `estimate` knows better, after the way back
        x, new_state = solver.finish(condition, carry)
        return x, new_state, count, num_back

    @property
    def _largest_error(self) -> float:
        if isinstance(self.num_steps, int):
            return LARGEST_TRUNCATION
        return max(LARGEST_ERROR, 10 * self.rtol)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        own = None if isinstance(self.num_steps, int) else self._remainder
        return estimate_through(
            self.unroll, query, state, self.max_growth, self._largest_error, own
        )

    def _remainder(self, seen: Probe, grad: PyTree, num_steps: Array) -> Own:
        """Of the series that was cut: its size, what to do about it, and what finding it took."""
        norm = tree_norm(grad)
        error = jnp.maximum(seen.remainder, seen.jacobian_error * norm)
        result = RESULTS.where(error <= self.rtol * norm, RESULTS.successful, RESULTS.inaccurate)
        result = RESULTS.where(seen.is_growing > 0, RESULTS.burn_in, result)
        num_back = seen.num_back.astype(jnp.int32)
        # a tangent costs about a Hessian product and a cross product
        counts = Counts(2 * num_steps + 2 * num_back + 2, num_steps + num_back, num_back)
        return result, error, counts

    def _while_loop(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: PyTree,
        *,
        max_steps: int | None,
    ) -> PyTree:
        """The loop of an Optimistix solver, differentiated where it matters."""
        if max_steps is None:
            raise ValueError(
                "Truncated('auto') needs a bound on the number of steps: pass max_steps=... ."
            )
        return repeat_until_negligible(
            body_fun,
            lambda carry: jnp.logical_not(cond_fun(carry)),
            stop_gradient(init_val),
            max_steps,
            self.rtol,
            None,
        )[0]


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
