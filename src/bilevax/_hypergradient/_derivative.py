"""The derivative of an estimate itself: of its value, its hypergradient, x and v."""

from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._tree import is_symbolic, tangent_or_zero

WAY_OUT = (
    "Use rule=bx.Implicit(), whose estimates have derivatives in both modes, or, for a first "
    "derivative of the outer objective, the solution map: bx.argmin(inner, inner_solver, rule)."
)


def with_derivative(fn: Callable, args: tuple, differentiate: Callable) -> Any:
    """`fn(*args)`, with a derivative of its own.

    `differentiate(moving, still, dots, out)` returns the tangent of `out`, `None` where it
    has none. `moving` are the floating-point arrays of `args` that move, `dots` their
    tangents, `still` all the rest of `args`.
    """
    arrays, static = eqx.partition(args, eqx.is_array)
    static_out: list[PyTree] = []

    @jax.custom_jvp
    def call(arrays: PyTree) -> PyTree:
        out_arrays, rest = eqx.partition(fn(*eqx.combine(arrays, static)), eqx.is_array)
        static_out[:] = [rest]
        return out_arrays

    def call_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        (arrays,), (dots,) = primals, tangents
        out = call(arrays)  # carries the rule again: for derivatives of higher order
        moves = jtu.tree_map(_moves, arrays, dots)
        moving, still = eqx.partition(arrays, moves)
        tangent = differentiate(
            moving,
            eqx.combine(still, static),
            eqx.filter(dots, moves),
            eqx.combine(out, static_out[0]),
        )
        return out, jtu.tree_map(tangent_or_zero, out, tangent)

    call.defjvp(call_jvp, symbolic_zeros=True)
    return eqx.combine(call(arrays), static_out[0])


def refuse_derivative(fn: Callable, args: tuple, name: str, reason: str) -> Any:
    """`fn(*args)`, whose derivative is refused."""

    def refuse(*_: Any) -> NoReturn:
        raise TypeError(f"A derivative of the estimate of `{name}` is refused: {reason}. {WAY_OUT}")

    return with_derivative(fn, args, refuse)


def refuse_backward(out: PyTree, name: str, reason: str) -> PyTree:
    """`out`, which may be differentiated in forward mode only."""
    message = (
        f"The estimate of `{name}` has no derivative in reverse mode: {reason}. Use forward mode "
        f"(jax.jacfwd, jax.jvp). {WAY_OUT}"
    )
    inexact, rest = eqx.partition(out, eqx.is_inexact_array)
    return eqx.combine(eqxi.nondifferentiable_backward(inexact, msg=message), rest)


def unmoved(state: PyTree, name: str) -> PyTree:
    """A warm start, whose own dependence on what is differentiated is refused.

    The steps begin there, and their derivative takes it as a constant.
    """

    def refuse(*_: Any) -> NoReturn:
        raise TypeError(
            f"`state` moves with what is differentiated, and `{name}` takes it as a constant: "
            "pass jax.lax.stop_gradient(state) if it is meant as one, or use rule=bx.Implicit(), "
            "to which the start of the inner solve does not matter."
        )

    return with_derivative(lambda state: state, (state,), refuse)


def _moves(array: Any, dot: Any) -> bool:
    return eqx.is_inexact_array(array) and not is_symbolic(dot)
