"""One interface to all outer optimisers, and the two kinds that are not ours: Optax, Optimistix."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._as_written import OneLine
from .._hypergradient._base import Estimate
from .._jit import Opaque, optimizer_as_pytree, standard_promotion
from .._tree import strong, tree_dot, tree_sub, unbounded


class Update(NamedTuple):
    """What an outer optimiser made of one evaluation."""

    theta: PyTree[Array]
    state: PyTree
    is_done: Bool[Array, ""]
    predicted_decrease: Scalar | None  # see `StepInfo`


class AbstractOuterOptimizer(OneLine, eqx.Module):
    """Moves theta, one evaluation a step.

    Law: `next_point` says where the hypergradient is wanted, and `update` is told what
    it was. An optimiser that `can_reject` tries points that it may take back: it is told
    of a failed evaluation too, as of an infinite value.
    """

    @property
    @abc.abstractmethod
    def can_reject(self) -> bool:
        """Whether it tries points that it may take back."""

    # Whether it differentiates the value twice, for which the rule must be an implicit one.
    needs_implicit: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, theta: PyTree) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def next_point(self, theta: PyTree, state: PyTree) -> PyTree:
        """Where the next evaluation is wanted: theta, or a trial."""

    @abc.abstractmethod
    def update(
        self,
        theta: PyTree,
        state: PyTree,
        estimate: Estimate,
        value_fn: Callable[[PyTree], Scalar],
    ) -> Update:
        """The step on `estimate`, taken at `next_point`.

        `value_fn(theta) = L(x*(theta), theta)` may be evaluated there only, but
        differentiated as often as wanted, if the rule is an implicit one.
        """


def as_outer_optimizer(optimizer: Any) -> AbstractOuterOptimizer:
    """What the user gave, in our interface. Adam(0.1) if nothing."""
    if optimizer is None:
        optimizer = optax.adam(0.1)
    if isinstance(optimizer, AbstractOuterOptimizer):
        return optimizer
    if isinstance(optimizer, optax.GradientTransformation):
        return _Optax(optimizer_as_pytree(optimizer))
    if isinstance(optimizer, optx.AbstractMinimiser):
        return _Optimistix(optimizer)
    raise TypeError(
        "`optimizer` must be an Optax transformation such as optax.adam(0.1), an Optimistix "
        "minimiser such as optx.BFGS(...), bx.OuterLBFGS() or bx.OuterNewton(); got "
        f"{type(optimizer).__name__}."
    )


def rejected(estimate: Estimate, usable: Bool[Array, ""]) -> Estimate:
    """`estimate`; where it is not usable, one that a line search rejects."""
    grad = jtu.tree_map(lambda a: jnp.where(usable, a, 0), estimate.grad)

    def high(value: Array) -> Array:
        return jnp.where(usable, value, unbounded(value))

    dual_value = None if estimate.dual_value is None else high(estimate.dual_value)
    return dataclasses.replace(
        estimate, value=high(estimate.value), dual_value=dual_value, grad=grad
    )


class _Optax(AbstractOuterOptimizer):
    """Any Optax transformation."""

    stands_for = "optimizer"

    optimizer: Any

    @property
    def can_reject(self) -> bool:
        return False

    def init(self, theta: PyTree) -> PyTree:
        with standard_promotion():
            return strong(self.optimizer.init(theta))

    def next_point(self, theta: PyTree, state: PyTree) -> PyTree:
        del state
        return theta

    def update(
        self, theta: PyTree, state: PyTree, estimate: Estimate, value_fn: Callable
    ) -> Update:
        del value_fn
        optimizer = optax.with_extra_args_support(self.optimizer)
        try:
            with standard_promotion():
                updates, new_state = optimizer.update(
                    estimate.grad, state, theta, value=estimate.value, grad=estimate.grad
                )
                new_theta = optax.apply_updates(theta, updates)
        except TypeError as error:
            if "value_fn" not in str(error):
                raise
            raise TypeError(
                "This Optax optimiser searches along a line and wants to evaluate the outer "
                "objective by itself. Use bx.OuterLBFGS(), an Optimistix minimiser such as "
                "optx.BFGS(rtol, atol), or optax.lbfgs(learning_rate, linesearch=None)."
            ) from error
        return Update(new_theta, strong(new_state), jnp.array(False), None)


class _Optimistix(AbstractOuterOptimizer):
    """An Optimistix minimiser that works with gradients."""

    stands_for = "optimizer"

    optimizer: optx.AbstractMinimiser

    @property
    def can_reject(self) -> bool:
        return not isinstance(self.optimizer, optx.OptaxMinimiser)

    def init(self, theta: PyTree) -> PyTree:
        struct = jax.eval_shape(lambda: tree_dot(theta, theta))
        state = self.optimizer.init(_no_function, theta, None, {}, struct, None, _TAGS)
        dynamic, static = eqx.partition(state, eqx.is_array)
        _check_evaluates_once(self.optimizer, state)
        return dynamic, Opaque(static)

    def next_point(self, theta: PyTree, state: PyTree) -> PyTree:
        if not self.can_reject:
            return theta
        dynamic, static = state
        return eqx.combine(dynamic, static.value).y_eval

    def update(
        self, theta: PyTree, state: PyTree, estimate: Estimate, value_fn: Callable
    ) -> Update:
        del value_fn
        dynamic, static = state
        fn = _known_at(self.next_point(theta, state), estimate)
        solver_state = eqx.combine(dynamic, static.value)
        new_theta, new_state, _ = self.optimizer.step(fn, theta, None, {}, solver_state, _TAGS)
        done, _ = self.optimizer.terminate(fn, new_theta, None, {}, new_state, _TAGS)
        new_dynamic, _ = eqx.partition(new_state, eqx.is_array)
        new_dynamic = jtu.tree_map(lambda a, b: a.astype(b.dtype), new_dynamic, dynamic)
        return Update(new_theta, (new_dynamic, static), jnp.asarray(done), None)


def _known_at(point: PyTree, estimate: Estimate) -> Callable:
    """The objective as Optimistix wants it, where we know it."""

    @jax.custom_jvp
    def value_at(theta: PyTree) -> Array:
        # The optimiser evaluates once a step, at `point`. Anywhere else we know nothing.
        moved = tree_sub(theta, point)
        return jnp.where(tree_dot(moved, moved) == 0, estimate.value, jnp.nan)

    @value_at.defjvp
    def value_at_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        return value_at(*primals), tree_dot(estimate.grad, tangents[0])

    def fn(theta: PyTree, args: None) -> tuple[Array, None]:
        del args
        return value_at(theta), None

    return fn


_TAGS: frozenset[object] = frozenset()


def _no_function(theta: PyTree, args: None) -> Any:
    raise AssertionError("an outer optimiser must not evaluate before its first step")


def _check_evaluates_once(optimizer: Any, state: Any) -> None:
    if not (isinstance(optimizer, optx.OptaxMinimiser) or hasattr(state, "y_eval")):
        raise TypeError(
            "As outer optimiser an Optimistix minimiser must evaluate the objective once a "
            "step, with its gradient: optx.BFGS, optx.LBFGS, optx.DFP, optx.GradientDescent, "
            f"optx.NonlinearCG. {type(optimizer).__name__} does not."
        )
