"""The best evaluation of a run, whatever the method, and how the end compares with it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._tree import tree_where
from ._base import StepInfo


class Best(eqx.Module):
    """The best of the evaluations whose values may be compared, and how the last one stands.

    Values are known up to an error: the best is the one with the smallest upper bound.
    """

    theta: PyTree[Array]
    x: PyTree[Array]
    aux: PyTree
    highest: Scalar  # what its value may be at most
    row: Int[Array, ""]  # of the history; -1 for none yet
    first_highest: Scalar  # what the value of the first that may be compared is at most
    # of the last evaluation
    is_usable: Bool[Array, ""]
    is_comparable: Bool[Array, ""]
    is_random: Bool[Array, ""]
    is_as_good: Bool[Array, ""]  # as the best, as far as errors allow to tell
    is_above_start: Bool[Array, ""]

    @staticmethod
    def none(state: Any, value: Any) -> "Best":
        """Before the first evaluation. Copies, because the chunks overwrite both."""
        theta, x, aux = jtu.tree_map(
            lambda a: jnp.copy(a) if eqx.is_array(a) else a, (state.theta, state.x, state.aux)
        )
        row = jnp.full((), -1, jnp.int32)
        highest, first = (jnp.zeros((), value.dtype) for _ in range(2))
        flags = [jnp.zeros((), bool) for _ in range(5)]  # not one array: they are donated
        return Best(theta, x, aux, highest, row, first, *flags)

    def after(self, state: Any, info: StepInfo, row: Int[Array, ""]) -> "Best":
        """The best after one more evaluation, to which `state` and `info` belong."""
        lowest, highest = info.value_range
        is_first = self.row < 0
        is_better = info.is_comparable & (is_first | (highest <= self.highest))
        seen = (state.point, state.x, state.aux, highest, row)
        known = (self.theta, self.x, self.aux, self.highest, self.row)
        arrays, static = eqx.partition(known, eqx.is_array)
        best = tree_where(is_better, eqx.filter(seen, eqx.is_array), arrays)
        theta, x, aux, highest, row = eqx.combine(best, static)
        comparable = info.is_comparable
        first = jnp.where(is_first & comparable, highest, self.first_highest)
        return Best(
            theta=theta,
            x=x,
            aux=aux,
            highest=highest,
            row=row,
            first_highest=first,
            is_usable=info.is_usable,
            is_comparable=comparable,
            is_random=info.is_random,
            is_as_good=comparable & (lowest <= highest),
            is_above_start=comparable & (lowest > first),
        )


class Chosen(NamedTuple):
    """An evaluation of a run."""

    theta: PyTree
    x: PyTree
    aux: PyTree
    row: int


def choose(
    state: Any, best: Best, values: np.ndarray, results: np.ndarray
) -> tuple[Chosen, Chosen, str]:
    """What is returned of a run, the best of it, and the outcome.

    Returned is the last evaluation or, if that is above the start or not usable, the best.
    Where values cannot be compared, because x is no solution and depends on the steps
    before or on chance, theta is not judged by them: the last one is it.
    """
    last = Chosen(state.theta, state.x, state.aux, len(values) - 1)
    is_usable, is_comparable = bool(best.is_usable), bool(best.is_comparable)
    top, result = last, str(results[-1])
    if int(best.row) >= 0 and not best.is_as_good and (is_comparable or not is_usable):
        top = Chosen(best.theta, best.x, best.aux, int(best.row))
    if best.is_above_start:
        return top, top, "not_improved"
    if not is_usable:
        return top, top, result
    rise = values[-1] - values[0]
    rounding = 10 * float(jnp.finfo(best.highest.dtype).eps) * np.max(np.abs(values[[0, -1]]))
    if not is_comparable and not best.is_random and rise > rounding:
        result = "not_improved"
    return last, top, result
