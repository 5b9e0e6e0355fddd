"""A user's function that can be differentiated in one mode only, as a function for both."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._tree import closure_convert
from ._forward import Arrays, Flat, by_forward
from ._mode import Mode
from ._refusal import no_derivative
from ._reverse import by_reverse


class OneMode(eqx.Module):
    """`fn`, with derivatives in both modes made from the one that it has.

    Its derivatives are those of the arrays that `fn` returns; `has_aux` if it returns
    `(value, aux)`, of which `aux` is taken as constant.
    """

    fn: Callable
    mode: Mode = eqx.field(static=True)
    has_aux: bool = eqx.field(default=False, static=True)

    def __call__(self, *args: PyTree) -> Any:
        # What the function closes over may be traced, and differentiated, too.
        converted = closure_convert(self.fn, *args)
        operands, static = eqx.partition((converted, args), eqx.is_array)
        leaves, structure = jtu.tree_flatten(operands)

        def whole(arrays: Arrays) -> Any:
            fn, args = eqx.combine(jtu.tree_unflatten(structure, list(arrays)), static)
            return fn(*args)

        def flat(arrays: Arrays) -> list[Array]:
            out = whole(arrays)
            return jtu.tree_leaves(out[0] if self.has_aux else out)

        values = _BY[self.mode](flat)(leaves)
        shape = eqx.filter_eval_shape(whole, leaves)
        if not self.has_aux:
            return jtu.tree_unflatten(jtu.tree_structure(shape), values)
        aux = whole(jax.lax.stop_gradient(leaves))[1]
        return jtu.tree_unflatten(jtu.tree_structure(shape[0]), values), aux


def _by_neither(fn: Flat) -> Flat:
    @eqx.filter_custom_jvp
    def call(arrays: Arrays) -> list[Array]:
        return fn(arrays)

    @call.def_jvp
    def call_jvp(primals: tuple, tangents: tuple) -> tuple:
        del primals, tangents
        raise no_derivative()

    return call


_BY: dict[Mode, Callable[[Flat], Flat]] = {
    "reverse": by_reverse,
    "forward": by_forward,
    "neither": _by_neither,
}
