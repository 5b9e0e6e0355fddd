"""The double loop: an inner solve and a hypergradient for every outer step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._hypergradient._base import AbstractHypergradient, HypergradientState, Query
from .._hypergradient.implicit._implicit import Implicit
from .._hypergradient.implicit._minimum_norm import MinimumNorm
from .._inner._base import AbstractInnerSolver
from .._inner._default import as_inner_solver
from .._inner._external import wherever
from .._problem import Bilevel, is_start_function, start_at
from .._tree import tree_where, tree_zeros_like
from ._base import AbstractMethod
from ._evaluation import Evaluation, Place
from ._fall_back import MAX_FAILURES, fall_back, is_usable, same_place
from ._predict import Anchor, Prediction, follow, predict
from ._tolerances import AbstractToleranceSchedule, at_tolerances
from ._update import AbstractOuterOptimizer, as_outer_optimizer, rejected

_STARTS = ("warm", "cold", "predicted")


class DoubleLoop(AbstractMethod):
    """Solve the inner problem, estimate the hypergradient, move theta; repeat.

    **Arguments:**

    - `inner_solver`: as in `bx.hypergradient`.
    - `hypergradient`: the rule; `bx.Implicit()` by default.
    - `optimizer`: any Optax transformation; `bx.OuterLBFGS()` or `bx.OuterNewton()`; or an
        Optimistix minimiser that works with gradients (`optx.BFGS`, `optx.LBFGS`,
        `optx.GradientDescent`, `optx.NonlinearCG`, ...). Default: `optax.adam(0.1)`, whose
        first steps change every entry of theta by about 0.1: sound where theta holds
        logarithms of strengths, the usual case.
    - `start`: where each inner solve starts, and so which solution is meant where there
        are many; see below. `"warm"`, `"cold"` or `"predicted"`.
    - `warm_start_adjoint`: start each adjoint solve at the previous `v`. On by default.
    - `tolerances`: `bx.ExponentialTolerance(...)` or `bx.PolynomialTolerance(...)`, which
        set the relative tolerances of the inner solve and of the adjoint system at each
        outer step; by default they are those of the inner solver and of the rule.

    **Starts.** Where the inner solution is unique, a start changes only the cost:

    - `"warm"`: from the previous x. The default, except where the rule differentiates
        through an `x0` that is a function of theta, which a warm start would cut off.
        Where there are many solutions, the one that is found depends on the path that
        theta has taken: the run is a game between two players, not a minimisation.
    - `"cold"`: from `x0`, each time. Where there are many solutions, `x*(theta)` is the
        one that the inner solver reaches from `x0` (for least squares, the nearest to
        `x0`): a function of theta alone.
    - `"predicted"`: from `x + D x* (theta_new - theta_old)`. Follows a branch of solutions:
        where the tangents at both ends of a step disagree with the move of x by more than
        half, the step is flagged as `jumped`. Costs two linear solves to two digits an
        outer step.

    Theta does not move on a flagged hypergradient, which is recorded, unless it is flagged for
    rounding alone: `stalled`, the adjoint residual a tenth of its right-hand side at most.
    The fallback: twice, the inner and adjoint solves go on from where they stopped (more
    steps at the same theta); then, and at once if something is not finite or the solution
    has jumped, theta goes back half of its last step (an optimiser with a line search
    rejects its trial and searches on); after ten failures in a row the method gives up. A
    solution that still jumps after three half steps is accepted, and remains flagged: the
    branch has ended, and the run goes on along the new one.

    **Cost:** an inner solve and a hypergradient for each outer step.

    !!! example

        ```python
        import bilevax as bx, optax

        method = bx.DoubleLoop(
            inner_solver=bx.LBFGS(rtol=1e-5),
            hypergradient=bx.Implicit(bx.linear.CG(rtol=1e-3)),
            optimizer=optax.adam(0.05),
        )
        ```

    Reference: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel
    optimization", 2022, algorithm 1 (warm starts of both systems).
    """

    inner_solver: Any
    hypergradient: AbstractHypergradient
    optimizer: AbstractOuterOptimizer
    start: str | None = eqx.field(static=True)
    warm_start_adjoint: bool
    tolerances: AbstractToleranceSchedule | None

    def __init__(
        self,
        inner_solver: Any = None,
        hypergradient: AbstractHypergradient | None = None,
        optimizer: optax.GradientTransformation
        | optx.AbstractMinimiser
        | AbstractOuterOptimizer
        | None = None,
        *,
        start: str | None = None,
        warm_start_adjoint: bool = True,
        tolerances: AbstractToleranceSchedule | None = None,
    ) -> None:
        hypergradient = Implicit() if hypergradient is None else hypergradient
        if not isinstance(hypergradient, AbstractHypergradient):
            raise TypeError(
                "`hypergradient` must be a rule of bilevax, bx.Implicit(), bx.Unrolled(), "
                f"bx.Truncated(...), bx.OneStep() or another; got {type(hypergradient).__name__}."
            )
        if start not in (None, *_STARTS):
            raise ValueError(
                f"`start` must be 'warm', 'cold' or 'predicted', or None; got {start!r}."
            )
        if start == "predicted" and _needs_host(inner_solver):
            raise ValueError(
                "start='predicted' needs an inner solver that JAX can see; External has "
                "start='warm' or start='cold'."
            )
        if not (tolerances is None or isinstance(tolerances, AbstractToleranceSchedule)):
            raise TypeError(
                "`tolerances` must be bx.ExponentialTolerance(...) or "
                f"bx.PolynomialTolerance(...); got {type(tolerances).__name__}."
            )
        optimizer = as_outer_optimizer(optimizer)
        if optimizer.needs_implicit and not hypergradient.is_implicit:
            raise TypeError(
                f"{type(optimizer).__name__} differentiates twice and needs an implicit rule, "
                f"bx.Implicit() or bx.MinimumNorm(); got {type(hypergradient).__name__}. Use "
                "bx.OuterLBFGS()."
            )
        self.inner_solver = inner_solver
        self.hypergradient = hypergradient
        self.optimizer = optimizer
        self.start = start
        self.warm_start_adjoint = warm_start_adjoint
        self.tolerances = tolerances

    def for_singular(self) -> "DoubleLoop | None":
        rule = self.hypergradient
        if self.tolerances is not None or not rule.is_default:
            return None
        return dataclasses.replace(self, hypergradient=MinimumNorm(inexact=rule.is_inexact))

    def with_rule(self, rule: AbstractHypergradient) -> "DoubleLoop | None":
        is_open = self.hypergradient == Implicit()
        return dataclasses.replace(self, hypergradient=rule) if is_open else None

    @property
    def needs_host(self) -> bool:
        return _needs_host(self.inner_solver)

    def on_host(
        self, problem: Bilevel, x0: PyTree, state: "DoubleLoopState", is_last: bool
    ) -> "DoubleLoopState":
        at = state.move
        point = at.theta if is_last else self.optimizer.next_point(at.theta, at.optimizer)
        start = start_at(x0, point) if self.start == "cold" else state.x
        _, x = self.inner_solver.before(problem.inner, start, point)
        return eqx.tree_at(lambda s: s.hypergradient.x, state, x)

    def init(self, problem: Bilevel, x0: PyTree, theta: PyTree) -> "DoubleLoopState":
        count = jnp.asarray(0, jnp.int32)
        solver, rule = self._parts(problem, start_at(x0, theta), count)
        hypergradient = rule.init(Query(problem, solver, x0, theta))
        return DoubleLoopState(
            move=_Move(theta, self.optimizer.init(theta), theta),
            point=theta,
            hypergradient=hypergradient,
            num_failures=count,
            num_evaluations=count,
            anchor=Anchor(theta, hypergradient.x) if self.start == "predicted" else None,
        )

    def evaluate(
        self, problem: Bilevel, x0: PyTree, state: "DoubleLoopState", is_last: Bool[Array, ""]
    ) -> tuple[Evaluation, "DoubleLoopState"]:
        # 1. the hypergradient at the point the optimiser wants to see
        now = state.move
        point = self.optimizer.next_point(now.theta, now.optimizer)
        point = tree_where(is_last, now.theta, point)
        solver, rule = self._parts(problem, state.x, state.num_evaluations)
        start, prediction = self._start(problem, x0, state, point)
        warm = state.hypergradient
        if not self.warm_start_adjoint and warm.v is not None:
            warm = eqx.tree_at(lambda s: s.v, warm, tree_zeros_like(warm.v))
        estimate, hypergradient = rule.estimate(Query(problem, solver, start, point), warm)
        if state.anchor is not None and prediction is not None:
            linear_solver = self._tangent_solver
            estimate = follow(
                problem.inner, linear_solver, state.anchor, prediction, point, estimate
            )
        # 2. a failure does not move theta along it
        usable = is_usable(estimate, state.num_failures, self.optimizer.can_reject)
        retry_theta, hypergradient, num_failures, go_back = fall_back(
            now.theta,
            now.good_theta,
            state.num_failures,
            state.hypergradient,
            estimate,
            hypergradient,
            usable,
        )
        moves, seen = usable, estimate
        if self.optimizer.can_reject:  # a line search goes back by itself
            retry_theta, seen = now.theta, rejected(estimate, usable)
            moves = usable | go_back
        # 3. what the optimiser makes of it
        value_fn = _value_fn(problem, rule, estimate.x)
        new = self.optimizer.update(now.theta, now.optimizer, seen, value_fn)
        new_state = DoubleLoopState(
            move=now,
            point=point,
            hypergradient=hypergradient,
            num_failures=num_failures,
            num_evaluations=state.num_evaluations + 1,
            anchor=_next_anchor(state.anchor, usable, point, estimate.x),
        )
        # `L(x_K(theta), theta)` of a fixed start and fixed steps
        is_deterministic = hypergradient.rule is None and solver.is_repeatable
        is_function = is_deterministic and self._start_of(x0) == "cold"
        evaluation = Evaluation.of(
            estimate,
            point,
            usable=usable,
            is_function=is_function,
            place=Place(point, hypergradient.x, estimate.aux),
            predicted_decrease=new.predicted_decrease,
            is_random=jnp.array(not is_deterministic),
            should_stop=new.is_done & usable & ~is_last,
            gave_up=num_failures >= MAX_FAILURES,
            proposal=tree_where(
                moves,
                _Move(new.theta, new.state, now.theta),
                _Move(retry_theta, now.optimizer, now.good_theta),
            ),
        )
        return evaluation, new_state

    def step(
        self, problem: Bilevel, state: "DoubleLoopState", seen: Evaluation
    ) -> "DoubleLoopState":
        del problem
        return dataclasses.replace(state, move=seen.proposal)

    def _parts(
        self, problem: Bilevel, x: PyTree, num_steps: Int[Array, ""]
    ) -> tuple[AbstractInnerSolver, AbstractHypergradient]:
        """Inner solver and rule, with the tolerances of this step."""
        solver = as_inner_solver(self.inner_solver, problem.inner, x).in_program
        if self.tolerances is None:
            return solver, self.hypergradient
        tolerances = self.tolerances.tolerances(num_steps, x)
        return at_tolerances(solver, self.hypergradient, problem.inner, x, tolerances)

    @property
    def _tangent_solver(self) -> Any:
        return getattr(self.hypergradient, "linear_solver", None)

    def _start(
        self, problem: Bilevel, x0: PyTree, state: "DoubleLoopState", point: PyTree
    ) -> tuple[PyTree, Prediction | None]:
        """Where the inner solve starts, and the prediction, if there is one."""
        if state.anchor is not None:
            prediction = predict(problem.inner, self._tangent_solver, state.anchor, point)
            # A retry at the same theta goes on from where the last solve stopped.
            is_retry = same_place(point, state.point)
            return tree_where(is_retry, state.x, prediction.x), prediction
        return (x0 if self._start_of(x0) == "cold" else state.x), None

    def _start_of(self, x0: PyTree) -> str:
        if self.needs_host:  # which has begun where it should: x is what it found
            return "warm"
        if self.start is not None:
            return self.start
        is_function = is_start_function(x0) and self.hypergradient.differentiates_start
        return "cold" if is_function else "warm"


class _Move(NamedTuple):
    """Where theta stands, and what the optimiser knows there."""

    theta: PyTree[Array]
    optimizer: PyTree
    good_theta: PyTree[Array]  # the last theta whose hypergradient was not flagged


class DoubleLoopState(eqx.Module):
    """What the next evaluation and the next step need."""

    move: _Move
    point: PyTree[Array]  # where the last evaluation was
    hypergradient: HypergradientState  # the warm starts
    num_failures: Int[Array, ""]  # in a row
    num_evaluations: Int[Array, ""]
    anchor: Anchor | None  # where predictions start

    @property
    def theta(self) -> PyTree[Array]:
        return self.move.theta

    @property
    def x(self) -> PyTree[Array]:
        """The inner solution of the last evaluation."""
        return self.hypergradient.x


def _needs_host(inner_solver: Any) -> bool:
    return getattr(inner_solver, "needs_host", False)


def _next_anchor(
    anchor: Anchor | None, usable: Bool[Array, ""], theta: PyTree, x: PyTree
) -> Anchor | None:
    return None if anchor is None else tree_where(usable, Anchor(theta, x), anchor)


def _value_fn(
    problem: Bilevel, rule: AbstractHypergradient, x: PyTree
) -> Callable[[PyTree], Scalar]:
    """`L(x*(theta), theta)` at the theta of `x`, with all derivatives of an implicit rule."""
    found = wherever(x)  # the estimate has judged x already

    def value_fn(theta: PyTree) -> Scalar:
        solved = rule.solution(Query(problem, found, x, theta), throw=False)
        return problem.outer_value(solved, theta)[0]

    return value_fn
