"""Any Optax transformation as an inner solver."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._checks import check_positive
from .._jit import optimizer_as_pytree, standard_promotion
from .._loop._rewrite import without_zero_over_zero
from .._problem import AbstractCondition
from .._tree import stop_gradient, strong, tree_dtype, tree_norm
from ._base import (
    ROUNDING,
    AbstractSteppingSolver,
    Counts,
    InnerSolution,
    measure,
    residual_and_scale,
    run,
)
from ._batches import as_batches, check_batches


class Descent(AbstractSteppingSolver):
    """`num_steps` updates of an Optax optimiser on the inner objective.

    `x_{k+1} = x_k + update(grad_x U(x_k, theta))`. Exactly `num_steps` updates, or fewer
    if a tolerance is given and met.

    **Arguments:**

    - `optimizer`: any `optax.GradientTransformation`, or a function of theta that returns
        one (its own parameters can then be learned by unrolling).
    - `num_steps`: the number of updates.
    - `rtol`, `atol`: stop as soon as `||grad_x U|| <= atol + rtol * scale`, `scale` as in
        `measure`. By default there is no stopping test.
    - `carry_state`: start with the optimiser's own state (moments, step counts) of the
        previous outer step. Off by default: moments that belong to another theta often hurt.
    - `batches`: each step sees a batch of the inner data, regenerated from the number of
        the step and never stored: `bx.Minibatches(size, key=...)`; an array of indices of
        shape (num_batches, batch_size), its rows taken in turn, so that the rows of a
        permutation make an epoch; or your function `(step, data) -> data`. Arrays of the
        data share their leading axis, the examples. What is minimised is your function of
        the batch: a mean over examples, not a sum. An outer variable per example is found
        by an index among the data (see the example). `x` is judged, as ever, by the gradient
        of all data, to which a fixed step size does not converge: implicit rules need
        `inexact=True`.
    - `restart_batches`: take the same batches in every outer step. By default the stream
        goes on where the last outer step has left it, so that a run sees all data; `bx.solve`
        carries its place, and so does the `state` of `bx.hypergradient`. Without a state, as
        in `bx.argmin` and in the first step, it starts at batch 0. A stream that goes on makes
        the objective random: `x` is no function of theta and the start alone. With a restart
        it is one, but only the examples in the first `num_steps` batches are ever seen.

    An implicit rule needs a solution: it flags an `x` whose gradient exceeds
    `atol + rtol * ||A z||` (`measure`), with the documented default of `rtol` where none
    was asked for.

    **Cost:** one gradient a step, of a batch if there are batches (and what the
    optimiser's line search takes).

    !!! example

        ```python
        import bilevax as bx, optax

        inner_solver = bx.Descent(optax.adam(1e-2), num_steps=500)
        ```

        Minibatches, and one weight per example, `theta[index]` in the inner function:

        ```python
        import bilevax as bx, jax, jax.numpy as jnp, optax

        def inner(x, theta, batch):
            errors = batch["features"] @ x - batch["targets"]
            return jnp.mean(jax.nn.sigmoid(theta[batch["index"]]) * errors**2)

        features = jnp.cos(jnp.arange(300.0)).reshape(100, 3)
        data = {"features": features, "targets": features[:, 0], "index": jnp.arange(100)}
        problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 0.5) ** 2), inner_data=data)
        inner_solver = bx.Descent(
            optax.sgd(0.3), num_steps=50, batches=bx.Minibatches(10, key=jax.random.key(0))
        )
        bx.hypergradient(
            problem, jnp.zeros(3), jnp.zeros(100), inner_solver=inner_solver, rule=bx.Unrolled()
        )
        ```
    """

    steps_by_gradient: ClassVar[bool] = True

    optimizer: Any
    num_steps: int
    rtol: float | None
    atol: float | None
    carry_state: bool
    batches: Callable[[Array, PyTree], PyTree] | None
    restart_batches: bool

    def __init__(
        self,
        optimizer: optax.GradientTransformation | Callable[[PyTree], Any],
        num_steps: int,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        carry_state: bool = False,
        batches: Any = None,
        restart_batches: bool = False,
    ) -> None:
        if not (isinstance(optimizer, optax.GradientTransformation) or callable(optimizer)):
            raise TypeError(
                "`optimizer` must be an optax.GradientTransformation such as optax.sgd(0.1), "
                f"or a function of theta that returns one; got {type(optimizer).__name__}."
            )
        check_positive(num_steps, "num_steps")
        is_fixed = isinstance(optimizer, optax.GradientTransformation)
        self.optimizer = optimizer_as_pytree(optimizer) if is_fixed else optimizer
        self.num_steps = num_steps
        self.rtol = rtol
        self.atol = atol
        self.carry_state = carry_state
        self.batches = as_batches(batches)
        self.restart_batches = restart_batches
        if restart_batches and batches is None:
            raise ValueError(
                "Descent(restart_batches=True) starts the stream of batches again, and there is "
                "none: give `batches` too."
            )
        if self.batches is not None and self._has_tolerance:
            raise ValueError(
                "`rtol` and `atol` stop at a small gradient, and that of one batch says nothing "
                "about convergence: with `batches` leave them out, and choose `num_steps`."
            )

    @property
    def max_steps(self) -> int:
        return self.num_steps

    @property
    def is_fixed_length(self) -> bool:
        return not self._has_tolerance

    def with_rtol(self, rtol: Array) -> "Descent | None":
        if not self._has_tolerance:
            return None
        return eqx.tree_at(lambda s: s.rtol, self, rtol, is_leaf=lambda leaf: leaf is None)

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del condition
        return self._initial(x0, theta)

    def start(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> PyTree[Array]:
        if condition.objective is None:
            remedy = (
                "optx.Newton(...) for a root or optx.FixedPointIteration(...) for a fixed point"
            )
            if condition.nonsmooth is not None:
                remedy = "bx.ProximalGradient(num_steps), which takes the steps of its penalty, too"
            raise TypeError(
                "`Descent` minimises a smooth objective, but the inner problem is a "
                f"{type(condition).__name__}. Use {remedy}."
            )
        if self.batches is not None:
            x0 = check_batches(self.batches, condition, x0)
        optimizer_state = self._resumed(state, x0, theta)
        rtol = self.rtol
        if not self._has_tolerance:
            if self.batches is not None or not _has_pairs(optimizer_state):
                return x0, optimizer_state
            # Where only rounding is left of the gradient, the differences of which such an
            # optimiser learns are 0/0: it rests there, and so does the derivative of x.
            rtol = ROUNDING * float(jnp.finfo(tree_dtype(x0)).eps)
        residual, scale = residual_and_scale(condition, x0, x0, theta)
        tolerance = self._tolerance(jnp.maximum(scale, residual), rtol)
        return x0, optimizer_state, tolerance, jnp.array(False)

    def step(
        self, condition: AbstractCondition, theta: PyTree, carry: PyTree[Array]
    ) -> PyTree[Array]:
        x, optimizer_state = carry[:2]
        batch_step = None
        if self.batches is not None:
            optimizer_state, batch_step = optimizer_state
            batch = self.batches(batch_step, condition.data)
            condition = dataclasses.replace(condition, data=batch)
        inner = condition.objective
        assert inner is not None

        def value_fn(x: PyTree) -> Array:
            return inner(x, theta)

        optimizer = self._optimizer(theta)

        def update(grad: PyTree, state: PyTree, x: PyTree, value: Array) -> tuple[PyTree, PyTree]:
            return optimizer.update(grad, state, x, value=value, grad=grad, value_fn=value_fn)

        value, grad = jax.value_and_grad(value_fn)(x)
        with standard_promotion():
            update = without_zero_over_zero(update, grad, optimizer_state, x, value)
            updates, new_state = update(grad, optimizer_state, x, value)
            new_x = optax.apply_updates(x, updates)
        new_state = jax.tree_util.tree_map(_counted_alike, strong(new_state), optimizer_state)
        if batch_step is not None:
            new_state = new_state, batch_step + 1
        if len(carry) == 2:
            return new_x, new_state
        residual, tolerance = tree_norm(jax.lax.stop_gradient(grad)), carry[2]
        done = residual <= tolerance
        if self._has_tolerance:
            # What the start let guess is measured where it decides.
            fixed = stop_gradient((condition, x, x, theta))
            tolerance = jax.lax.cond(
                done,
                lambda: self._tolerance(residual_and_scale(*fixed)[1], self.rtol),
                lambda: tolerance,
            )
            done = residual <= tolerance
        kept = jax.lax.cond(done, lambda: (x, optimizer_state), lambda: (new_x, new_state))
        return *kept, tolerance, done

    def is_done(self, carry: PyTree[Array]) -> Array | bool:
        return carry[3] if self._has_tolerance else False

    def finish(self, condition: AbstractCondition, carry: PyTree[Array]) -> tuple[PyTree, PyTree]:
        del condition
        return carry[0], carry[1]

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        carry = self.start(condition, x0, theta, state)
        carry, count = run(self, condition, theta, carry)
        x, new_state = self.finish(condition, carry)
        solution = measure(
            condition, x, x0, theta, self.rtol, self.atol, count, Counts(gradients=count)
        )
        return solution, new_state

    @property
    def _has_tolerance(self) -> bool:
        return self.rtol is not None or self.atol is not None

    @property
    def may_use_theta(self) -> bool:
        return not isinstance(self.optimizer, optax.GradientTransformation)

    def is_quasi_newton(self, x0: PyTree) -> bool:
        """Whether a step builds on differences of those before."""
        if self.may_use_theta:
            return False
        return _has_pairs(jax.eval_shape(self._optimizer(None).init, x0))

    def endless(self, carry: PyTree[Array]) -> tuple["Descent", PyTree[Array]]:
        if self.is_fixed_length:
            return self, carry
        return dataclasses.replace(self, rtol=None, atol=None), carry[:2]

    @property
    def is_repeatable(self) -> bool:
        return not self.carry_state and (self.batches is None or self.restart_batches)

    def _resumed(self, state: PyTree, x0: PyTree, theta: PyTree) -> PyTree:
        """What of the last solve's `state` this one starts with: the moments, the stream."""
        fresh = self._initial(x0, theta)
        if self.batches is None:
            return state if self.carry_state else fresh
        moments = state[0] if self.carry_state else fresh[0]
        return moments, fresh[1] if self.restart_batches else state[1]

    def _tolerance(self, scale: Array, rtol: Any) -> Array:
        return (self.atol or 0.0) + (0.0 if rtol is None else rtol) * scale

    def _initial(self, x0: PyTree, theta: PyTree) -> PyTree:
        with standard_promotion():
            initial = strong(self._optimizer(theta).init(x0))
        return initial if self.batches is None else (initial, jnp.asarray(0, jnp.int32))

    def _optimizer(self, theta: PyTree) -> optax.GradientTransformationExtraArgs:
        optimizer = self.optimizer
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(theta)
        return optax.with_extra_args_support(optimizer)


def _counted_alike(new: Array, old: Array) -> Array:
    """`new` in the integers of `old`: those of an older Optax turn from 64 bit to 32 in a step."""
    is_count = jnp.issubdtype(new.dtype, jnp.integer) and new.dtype != old.dtype
    return new.astype(old.dtype) if is_count else new


def _has_pairs(optimizer_state: PyTree) -> bool:
    """Whether part of an Optax state is the memory of L-BFGS."""
    kind = optax.ScaleByLBFGSState
    leaves = jax.tree_util.tree_leaves(optimizer_state, is_leaf=lambda s: isinstance(s, kind))
    return any(isinstance(leaf, kind) for leaf in leaves)
