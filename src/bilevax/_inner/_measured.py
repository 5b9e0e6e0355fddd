"""What the two default inner solvers share: the stopping rule and what they report."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._as_written import OneLine
from .._tree import default_rtol, tree_norm
from ._own_scale import norm


class AbstractMeasuredState(eqx.Module):
    """The part of a state that is reported.

    `residual` is the two-norm of the gradient at the last accepted iterate, `scale` what
    it is compared with.
    """

    aux: eqx.AbstractVar[PyTree]
    residual: eqx.AbstractVar[Scalar]
    scale: eqx.AbstractVar[Scalar]
    num_gradients: eqx.AbstractVar[Int[Array, ""]]
    num_hessian_products: eqx.AbstractVar[Int[Array, ""]]
    is_done: eqx.AbstractVar[Bool[Array, ""]]
    result: eqx.AbstractVar[optx.RESULTS]

    @property
    def is_first(self) -> Bool[Array, ""]:
        """Whether nothing has been evaluated yet."""
        return self.num_gradients == 0


class AbstractMeasuredMinimiser(OneLine, optx.AbstractMinimiser):
    """A minimiser that stops on its gradient and reports what it measured.

    Law: `is_done` exactly if `residual <= tolerance`, measured at the returned `y`.
    """

    rtol: eqx.AbstractVar[float | Scalar | None]
    atol: eqx.AbstractVar[float | Scalar]

    @property
    def norm(self) -> Callable[[PyTree], Scalar]:  # type: ignore[override]
        """The two-norm. Optimistix wants every solver to have a norm."""
        return tree_norm

    @abc.abstractmethod
    def init(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> Any:
        """The state before the first evaluation, with `y` as first candidate."""

    def terminate(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        state: AbstractMeasuredState,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        del fn, y, args, options, tags
        return state.is_done, state.result

    def postprocess(
        self,
        fn: Callable,
        y: PyTree[Array],
        aux: PyTree,
        args: PyTree,
        options: dict[str, Any],
        state: AbstractMeasuredState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[PyTree[Array], PyTree, dict[str, Any]]:
        del fn, aux, args, options, tags, result
        stats = {
            "residual": state.residual,
            "tolerance": self.tolerance(y, state.scale),
            "scale": state.scale,
            "num_gradients": state.num_gradients,
            "num_hessian_products": state.num_hessian_products,
        }
        return y, state.aux, stats

    def tolerance(self, y: PyTree[Array], scale: Scalar) -> Scalar:
        """What the residual has to reach, given `||H z||`."""
        rtol = default_rtol(y) if self.rtol is None else self.rtol
        return self.atol + rtol * scale


def size(a: PyTree[Array]) -> Scalar:
    """Two-norm for decisions: not differentiated, since it has no derivative at zero."""
    return norm(jax.lax.stop_gradient(a))


def empty_aux(aux_struct: PyTree) -> PyTree:
    """Zeros, until the first evaluation gives an auxiliary output."""
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), aux_struct)


def outcome(is_over: Bool[Array, ""], is_finite: Bool[Array, ""]) -> optx.RESULTS:
    """Why a line search that is over ended without a step."""
    results: Any = optx.RESULTS  # Equinox' enumerations are beyond type checkers
    why = results.where(is_finite, results.stagnation, results.nonfinite)
    return results.where(is_over, why, results.successful)
