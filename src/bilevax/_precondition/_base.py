"""Preconditioners: `A, x, theta, state -> (r -> z), state`, with `z` about `A^{-1} r`."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._as_written import OneLine
from .._problem import AbstractCondition

Apply = Callable[[PyTree[Array]], PyTree[Array]]


class AbstractPreconditioner(OneLine, eqx.Module):
    """Makes the adjoint system `A v = b` easier, for one outer step after the other.

    A preconditioner is another operator, a warm start another first guess: they help
    together, and neither replaces the other.

    Law: `apply` is linear, symmetric and positive definite, whatever `A` is. The state is
    a pytree of arrays whose shapes and dtypes `prepare` and `learn` do not change.
    """

    @abc.abstractmethod
    def init(self, x: PyTree[Array]) -> PyTree:
        """The state before the first adjoint solve."""

    @abc.abstractmethod
    def prepare(
        self,
        matvec: Callable[[PyTree], PyTree],
        condition: AbstractCondition,
        x: PyTree[Array],
        theta: PyTree,
        inner_state: PyTree,
        state: PyTree,
    ) -> tuple[Apply, PyTree, Int[Array, ""]]:
        """The preconditioner at `x`, the next state, and the Hessian products it cost.

        `matvec` is the product with `A`, linearised at `x`; `inner_state` what the inner
        solver's `solve` returned as its state.
        """

    def learn(self, state: PyTree, num_steps: Int[Array, ""]) -> PyTree:
        """The state after the adjoint solve, which took `num_steps` steps."""
        del num_steps
        return state


class FromFunction(AbstractPreconditioner):
    """The user's own: a function `(x, theta)` that returns a function `r -> z`."""

    fn: Callable

    def init(self, x: PyTree[Array]) -> None:
        del x

    def prepare(
        self,
        matvec: Callable[[PyTree], PyTree],
        condition: AbstractCondition,
        x: PyTree[Array],
        theta: PyTree,
        inner_state: PyTree,
        state: None,
    ) -> tuple[Apply, None, Int[Array, ""]]:
        del matvec, condition, inner_state, state
        return self.fn(x, theta), None, no_products()


def as_preconditioner(preconditioner: Any) -> AbstractPreconditioner | None:
    """`preconditioner` in the form of this module, if there is one."""
    if preconditioner is None or isinstance(preconditioner, AbstractPreconditioner):
        return preconditioner
    if isinstance(preconditioner, type) or not callable(preconditioner):
        name = getattr(preconditioner, "__name__", type(preconditioner).__name__)
        raise TypeError(
            "`preconditioner` must be one of bx.precondition, such as bx.precondition.Jacobi(), or "
            f"a function (x, theta) that returns a function r -> z; got {name}."
        )
    return FromFunction(preconditioner)


def no_products() -> Int[Array, ""]:
    """The count of a preconditioner that costs no Hessian product."""
    return jnp.zeros((), jnp.int32)
