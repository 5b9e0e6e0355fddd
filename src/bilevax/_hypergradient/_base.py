"""Hypergradient rules: `problem, x0, theta, state -> Estimate, state`."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._as_written import OneLine
from .._inner._base import AbstractInnerSolver, Counts
from .._problem import AbstractCondition, Bilevel, start_at
from .._results import RESULTS, first_failure
from .._tree import tree_all_finite
from ._call import Call
from ._derivative import refuse_derivative
from ._summary import summary


class Estimate(eqx.Module):
    """A hypergradient with its evidence. What a rule does not know is `None`.

    **Attributes:**

    - `value`: `L(x, theta)`.
    - `grad`: the hypergradient, in the structure of theta.
    - `aux`: what `outer` returned beside the value.
    - `x`: the inner solution it was taken at.
    - `inner_residual`: `||grad_x U(x, theta)||` (of a root or fixed point, the residual).
    - `result`: the outcome, see `RESULTS`.
    - `stats`: `num_inner_steps`, `num_adjoint_steps`, `num_gradients`,
        `num_hessian_products`, `num_cross_products`.
    - `v`: the adjoint variable, `A v = d_x L`; `None` for rules that solve no such system.
    - `inner_tolerance`: what `inner_residual` had to reach; `None` for rules that ask for
        nothing.
    - `adjoint_residual`: `||d_x L - A v|| / ||d_x L||`, measured; `None` for rules without an
        adjoint.
    - `adjoint_tolerance`: what it had to reach; `None` where nothing was asked for, as of a
        fixed number of steps. Infinite: the system has no solution, and `v` is the
        least-squares solution of a rule that takes that.
    - `error_estimate`: of `||grad - exact||`, from Newton steps on x and v (see
        `Implicit`, `Polished` and `Accurate`), or by other means of other rules; `None` where
        it was not asked for. Infinite: Newton's method, or the series of the rule, does not
        converge here, so that the error may have any size.
    - `error_bound`: `||grad - exact||` is no larger; `None` where no modulus of strong
        convexity is known (see `Implicit`). Infinite: there is no bound.
    - `damping_bias`: estimate of the part of `||grad - exact||` that damping causes; `None`
        without damping.
    - `dual_value`: `L(x, theta) - v' grad_x U(x, theta)`, the outer objective at the exact
        solution to second order in the error of x; `None` for rules without an adjoint.
    - `adjoint_growth`: for rules that go back through the steps, the mean norm of the
        adjoint of x on the way, relative to that at the end: below one where the steps
        contract, many orders of magnitude where derivatives explode. Otherwise `None`.
    - `is_bilevel`: for rules that differentiate the steps to x, whether x has converged and
        `grad` agrees with the implicit function theorem there. Then it is the hypergradient
        of the bilevel problem, and `error_estimate` its distance to the implicit one. Else
        it is the derivative of these steps. `None` for other rules.

    Under `jax_debug_infs` the largest number of the dtype stands for an infinity.
    """

    value: Scalar
    grad: PyTree[Array]
    aux: PyTree
    x: PyTree[Array]
    inner_residual: Scalar
    result: RESULTS
    stats: dict[str, Array]
    # the evidence that only some rules have
    v: PyTree[Array] | None = None
    inner_tolerance: Scalar | None = None
    adjoint_residual: Scalar | None = None
    adjoint_tolerance: Scalar | None = None
    error_estimate: Scalar | None = None
    error_bound: Scalar | None = None
    damping_bias: Scalar | None = None
    dual_value: Scalar | None = None
    adjoint_growth: Scalar | None = None
    is_bilevel: Bool[Array, ""] | None = None

    @classmethod
    def of(cls, value: Scalar, grad: PyTree, *results: RESULTS, **fields: Any) -> "Estimate":
        """The estimate whose outcome is the first failure of `results`, then of its numbers."""
        result = first_failure(*results, finite_or_not((value, grad)))
        return cls(value=value, grad=grad, result=result, **fields)

    def also(self, result: RESULTS, stats: Mapping[str, Any] | None = None) -> "Estimate":
        """The same after a further test: with its verdict, if it failed, and what it took."""
        result = RESULTS.where(result == RESULTS.successful, self.result, result)
        more = {name: self.stats[name] + count for name, count in (stats or {}).items()}
        return dataclasses.replace(self, result=result, stats={**self.stats, **more})

    def __repr__(self) -> str:
        return summary(self)

    @property
    def best_value(self) -> Scalar:
        """The best that is known of `L(x*(theta), theta)`: `dual_value`, or else `value`."""
        return self.value if self.dual_value is None else self.dual_value


class HypergradientState(eqx.Module):
    """What warm-starts the next hypergradient: for the machine, not for people."""

    x: PyTree[Array]  # the last inner solution
    v: PyTree[Array] | None  # the last adjoint variable
    inner: PyTree  # the inner solver's own state
    linear: PyTree = None  # the linear solver's: a recycled subspace
    preconditioner: PyTree = None  # a sketch, a diagonal
    tolerances: PyTree = None  # chosen by `Accurate(...)`
    rule: PyTree = None  # the rule's own: random keys, particles


class Query(NamedTuple):
    """What a rule is asked: how does `x*(theta)`, found by `inner_solver` from `x0`, move?"""

    problem: Bilevel
    inner_solver: AbstractInnerSolver
    x0: PyTree  # may be a function of theta
    theta: PyTree

    @property
    def condition(self) -> AbstractCondition:
        return self.problem.inner

    @property
    def start(self) -> PyTree:
        """Where the search for x starts, as arrays."""
        return start_at(self.x0, self.theta)

    @property
    def inner_state(self) -> PyTree:
        """The inner solver's state before the first solve."""
        return self.inner_solver.init(self.condition, self.start, self.theta)


class AbstractHypergradient(OneLine, optx.AbstractAdjoint):
    """A rule for differentiating through `x*(theta)`.

    Three views of one rule: `estimate` (with evidence and warm starts), `solution` (a
    differentiable function, behind `bx.argmin`), and `apply` (an Optimistix adjoint, for
    `optx.minimise(..., adjoint=rule)` and its siblings).
    """

    # What the library asks of a rule, and never its class.
    is_implicit: ClassVar[bool] = False  # the derivative of the solution itself, of any order
    needs_steps: ClassVar[bool] = False  # an inner solver whose steps JAX sees

    @property
    def is_default(self) -> bool:
        """Whether the library may choose how to treat a singular system."""
        return False

    @property
    def is_inexact(self) -> bool:
        """Whether the inner solve is stopped early on purpose."""
        return False

    def with_linear_rtol(
        self, rtol: Scalar, condition: AbstractCondition, x: PyTree
    ) -> "AbstractHypergradient | None":
        """The rule that solves its linear system to `rtol`; `None` if it has none to choose for."""
        del rtol, condition, x
        return None

    def with_error_estimate(self, wanted: bool) -> "AbstractHypergradient | None":
        """The rule whose estimates have an `error_estimate`, or not; `None` if it has no choice."""
        del wanted
        return None

    @abc.abstractmethod
    def init(self, query: Query) -> HypergradientState:
        """The state before the first estimate. `x0` may be a function of theta."""

    @abc.abstractmethod
    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        """The hypergradient at theta, the inner solve starting at `x0`.

        `x0` may be a function of theta. `state` warm-starts everything but `x`: whoever
        wants a warm start of `x` passes `state.x` as `x0`.
        """

    def differentiable_estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        """`estimate`, as `bx.hypergradient` calls it, which may itself be differentiated.

        Law: the derivative of whatever is returned is right, or refused by name. Refused
        unless a rule knows better: the steps of an iteration that has converged, or that
        is taken for a constant, do not tell how its result moves.
        """
        reason = "what it holds constant moves, and the derivative would leave that out"
        args = (self, query, state)
        return refuse_derivative(estimate_of, args, type(self).__name__, reason)

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: frozenset[object]
    ) -> PyTree:
        """What Optimistix asks of an adjoint."""
        del tags
        return self.attach_to_call(Call(primal_fn, rewrite_fn, inputs))

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        """The result of a call of Optimistix, `(x, rest)`, differentiable by this rule."""
        raise TypeError(
            f"{type(self).__name__} is no adjoint for optx.{call.kind}: use it in "
            "bx.hypergradient, bx.argmin or bx.solve."
        )

    @abc.abstractmethod
    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        """`x*(theta)`, differentiable by this rule in theta and the arrays of `condition`."""

    @property
    @abc.abstractmethod
    def differentiates_start(self) -> bool:
        """Whether a dependence of `x0` on theta reaches the hypergradient."""


def finite_or_not(numbers: PyTree) -> RESULTS:
    """`nonfinite`, unless all are numbers."""
    return RESULTS.where(tree_all_finite(numbers), RESULTS.successful, RESULTS.nonfinite)


def estimate_of(rule: AbstractHypergradient, *args: Any) -> tuple[Estimate, HypergradientState]:
    """`rule.estimate`, as a function of the rule too."""
    return rule.estimate(*args)


STATS = (
    "num_adjoint_steps",
    "num_cross_products",
    "num_gradients",
    "num_hessian_products",
    "num_inner_steps",
)


def as_stats(counts: Counts, num_inner_steps: Any, num_adjoint_steps: Any) -> dict[str, Array]:
    """The `stats` of an estimate."""
    return {
        "num_inner_steps": jnp.asarray(num_inner_steps, jnp.int32),
        "num_adjoint_steps": jnp.asarray(num_adjoint_steps, jnp.int32),
        "num_gradients": counts.num_gradients,
        "num_hessian_products": counts.num_hessian_products,
        "num_cross_products": counts.num_cross_products,
    }
