"""The double loop: an inner solve and a hypergradient for every outer step."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree

from .._hypergradient._base import AbstractHypergradient, Estimate, HypergradientState
from .._hypergradient._implicit import Implicit
from .._inner._default import as_inner_solver
from .._problem import Bilevel, start_at
from .._results import RESULTS
from .._tree import optimizer_as_pytree, tree_all_finite, tree_norm, tree_where, tree_zeros_like
from ._base import AbstractMethod, StepInfo
from ._update import can_reject, initial_update, next_point, rejected, update


class DoubleLoop(AbstractMethod):
    """Solve the inner problem, estimate the hypergradient, move theta; repeat.

    **Arguments:**

    - `inner_solver`: as in `bx.hypergradient`.
    - `hypergradient`: the rule; `bx.Implicit()` by default.
    - `optimizer`: any Optax transformation, or an Optimistix minimiser that works with
        gradients (`optx.BFGS`, `optx.LBFGS`, `optx.GradientDescent`,
        `optx.NonlinearCG`, ...). Default: `optax.adam(0.1)`, whose first steps change
        every entry of theta by about 0.1: sound where theta holds logarithms of
        strengths, the usual case.
    - `warm_start_inner`: start each inner solve at the previous `x`. On by default,
        except where the rule differentiates through an `x0` that is a function of theta,
        which a warm start would cut off.
    - `warm_start_adjoint`: start each adjoint solve at the previous `v`. On by default.

    A flagged hypergradient is recorded and, unless it is only the precision floor that
    was met, theta does not move on it. The fallback: twice, the inner and adjoint solves
    go on from where they stopped (more steps at the same theta); then, and at once if
    something is not finite, theta goes back half of its last step (an Optimistix
    minimiser rejects its trial and searches on); after ten failures in a row the method
    gives up.

    **Cost:** an inner solve and a hypergradient for each outer step.

    !!! example

        ```python
        import bilevax as bx, optax

        method = bx.DoubleLoop(
            inner_solver=bx.LBFGS(rtol=1e-5),
            hypergradient=bx.Implicit(bx.CG(rtol=1e-3)),
            optimizer=optax.adam(0.05),
        )
        ```

    Reference: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel
    optimization", 2022, algorithm 1 (warm starts of both systems).
    """

    inner_solver: Any
    hypergradient: AbstractHypergradient
    optimizer: Any
    warm_start_inner: bool | None
    warm_start_adjoint: bool

    def __init__(
        self,
        inner_solver: Any = None,
        hypergradient: AbstractHypergradient | None = None,
        optimizer: optax.GradientTransformation | optx.AbstractMinimiser | None = None,
        *,
        warm_start_inner: bool | None = None,
        warm_start_adjoint: bool = True,
    ) -> None:
        hypergradient = Implicit() if hypergradient is None else hypergradient
        if not isinstance(hypergradient, AbstractHypergradient):
            raise TypeError(
                "`hypergradient` must be bx.Implicit(), bx.Unrolled(), bx.Truncated(...) or "
                f"bx.OneStep(); got {type(hypergradient).__name__}."
            )
        optimizer = optax.adam(0.1) if optimizer is None else optimizer
        if not isinstance(optimizer, optax.GradientTransformation | optx.AbstractMinimiser):
            raise TypeError(
                "`optimizer` must be an Optax transformation such as optax.adam(0.1) or an "
                f"Optimistix minimiser such as optx.BFGS(...); got {type(optimizer).__name__}."
            )
        self.inner_solver = inner_solver
        self.hypergradient = hypergradient
        self.optimizer = (
            optimizer_as_pytree(optimizer)
            if isinstance(optimizer, optax.GradientTransformation)
            else optimizer
        )
        self.warm_start_inner = warm_start_inner
        self.warm_start_adjoint = warm_start_adjoint

    def init(self, problem: Bilevel, x0: PyTree, theta: PyTree) -> "DoubleLoopState":
        solver = as_inner_solver(self.inner_solver, problem.inner, start_at(x0, theta))
        hypergradient = self.hypergradient.init(problem, solver, x0, theta)
        aux = eqx.filter_eval_shape(lambda: problem.outer_value(hypergradient.x, theta)[1])
        return DoubleLoopState(
            theta=theta,
            point=theta,
            aux=jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype) if _is_array(s) else s, aux),
            hypergradient=hypergradient,
            optimizer=initial_update(self.optimizer, theta),
            good_theta=theta,
            num_failures=jnp.asarray(0, jnp.int32),
        )

    def step(
        self, problem: Bilevel, x0: PyTree, state: "DoubleLoopState", move: Bool[Array, ""]
    ) -> tuple["DoubleLoopState", StepInfo]:
        # 1. the hypergradient at the point the optimiser wants to see
        point = next_point(self.optimizer, state.theta, state.optimizer)
        point = tree_where(move, point, state.theta)
        warm = state.hypergradient
        start = warm.x if self._warm_starts_inner(x0) else x0
        if not self.warm_start_adjoint and warm.v is not None:
            warm = eqx.tree_at(lambda s: s.v, warm, tree_zeros_like(warm.v))
        solver = as_inner_solver(self.inner_solver, problem.inner, state.hypergradient.x)
        estimate, hypergradient = self.hypergradient.estimate(problem, solver, start, point, warm)
        # 2. a failure does not move theta along it
        usable = (estimate.result == RESULTS.successful) | (estimate.result == RESULTS.stalled)
        retry_theta, hypergradient, num_failures, go_back = _fall_back(
            state, estimate, hypergradient, usable
        )
        moved = usable & move
        seen = estimate
        if can_reject(self.optimizer):  # a line search goes back by itself
            retry_theta, seen = state.theta, rejected(estimate, usable)
            moved = (usable | go_back) & move
        # 3. the outer step
        theta, optimizer, done = update(self.optimizer, state.theta, state.optimizer, seen)
        new_state = DoubleLoopState(
            theta=tree_where(moved, theta, tree_where(move, retry_theta, state.theta)),
            point=point,
            aux=estimate.aux,
            hypergradient=hypergradient,
            optimizer=tree_where(moved, optimizer, state.optimizer),
            good_theta=tree_where(moved, state.theta, state.good_theta),
            num_failures=num_failures,
        )
        info = StepInfo(
            value=estimate.value,
            hypergradient_norm=tree_norm(estimate.grad),
            inner_residual=estimate.inner_residual,
            adjoint_residual=estimate.adjoint_residual,
            result=estimate.result,
            stats=estimate.stats,
            should_stop=done & moved & usable,
            gave_up=num_failures >= _MAX_FAILURES,
        )
        return new_state, info

    def _warm_starts_inner(self, x0: PyTree) -> bool:
        if self.warm_start_inner is None:
            return not (callable(x0) and self.hypergradient.differentiates_start)
        return self.warm_start_inner


_MAX_FAILURES = 10
_NUM_RETRIES = 2


class DoubleLoopState(eqx.Module):
    """What the next outer step needs."""

    theta: PyTree[Array]
    point: PyTree[Array]  # where the last evaluation was; `x` and `aux` belong to it
    aux: PyTree[Array]  # of the last evaluation
    hypergradient: HypergradientState  # the warm starts
    optimizer: PyTree
    good_theta: PyTree[Array]  # the last theta whose hypergradient was not flagged
    num_failures: Int[Array, ""]  # in a row

    @property
    def x(self) -> PyTree[Array]:
        """The inner solution of the last evaluation."""
        return self.hypergradient.x


def _fall_back(
    state: DoubleLoopState,
    estimate: Estimate,
    hypergradient: HypergradientState,
    usable: Bool[Array, ""],
) -> tuple[PyTree, HypergradientState, Int[Array, ""], Bool[Array, ""]]:
    """Theta, warm starts, the count of failures, and whether to go back half a step."""
    num_failures = jnp.where(usable, 0, state.num_failures + 1)
    finite = tree_all_finite((hypergradient, estimate.grad))
    go_back = ~usable & ((num_failures > _NUM_RETRIES) | ~finite)
    middle = jtu.tree_map(
        lambda a, b: jnp.where(jnp.isfinite(a), 0.5 * a + 0.5 * b, b),
        state.theta,
        state.good_theta,
    )
    kept = tree_where(finite, hypergradient, state.hypergradient)
    if kept.v is not None:
        # Only an unfinished adjoint solve leaves a v worth starting from.
        keep_v = usable | (finite & (estimate.result == RESULTS.adjoint_not_converged))
        v = tree_where(keep_v, kept.v, tree_zeros_like(kept.v))
        kept = eqx.tree_at(lambda s: s.v, kept, v)
    return tree_where(go_back, middle, state.theta), kept, num_failures, go_back


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
