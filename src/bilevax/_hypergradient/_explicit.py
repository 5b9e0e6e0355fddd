"""A step with everything it depends on as an argument, for derivative rules of loops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._tree import standard_promotion


class ExplicitStep(NamedTuple):
    """`step(carry)`, taken apart.

    Law: `apply(varying, fixed, carry, rest)` is the new `(carry, rest)`, and nothing else
    is differentiated than `varying` (floating-point arrays that the step closed over: theta,
    data, a learning rate) and `carry` (those of the carry); `fixed` and `rest` are the other
    arrays: counts, keys, labels.
    """

    apply: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    varying: PyTree[Array]
    fixed: PyTree[Array]
    carry: PyTree[Array]
    rest: PyTree[Array]

    def pull_back(
        self, varying: PyTree, fixed: PyTree, carry: PyTree, rest: PyTree, adjoint: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The adjoint of a step: of what it closed over, and of its carry."""

        def differentiable(varying: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            return self.apply(varying, fixed, carry, rest)

        _, transpose, _ = jax.vjp(differentiable, varying, carry, has_aux=True)
        return transpose(adjoint)


def explicit_step(step: Callable[[PyTree], PyTree], carry: PyTree[Array]) -> ExplicitStep:
    """`step` and `carry`, taken apart."""
    converted = eqx.filter_closure_convert(step, carry)
    varying, others = eqx.partition(converted, eqx.is_inexact_array)
    fixed, static = eqx.partition(others, eqx.is_array)
    start, rest = eqx.partition(carry, eqx.is_inexact_array)

    def apply(varying: PyTree, fixed: PyTree, carry: PyTree, rest: PyTree) -> tuple:
        whole: Any = eqx.combine(varying, fixed, static)
        with standard_promotion():  # the step may have been traced under it, for Optax
            out = whole(eqx.combine(carry, rest))
        return eqx.partition(out, eqx.is_inexact_array)

    return ExplicitStep(apply, varying, fixed, start, rest)
