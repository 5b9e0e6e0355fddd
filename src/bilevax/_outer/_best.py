"""The best evaluation of a run, whatever the method, and how the end compares with it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, Scalar

from .._tree import tree_where
from ._evaluation import Evaluation, Place


class Best(eqx.Module):
    """The best of the evaluations whose values may be compared, and how the last one stands.

    Values are known up to an error: the best is the one with the smallest upper bound.
    """

    place: Place
    highest: Scalar  # what its value may be at most
    row: Int[Array, ""]  # of the history; -1 for none yet
    first_highest: Scalar  # what the value of the first that may be compared is at most
    # of the last evaluation
    last: Place
    is_usable: Bool[Array, ""]
    is_comparable: Bool[Array, ""]
    is_random: Bool[Array, ""]
    is_as_good: Bool[Array, ""]  # as the best, as far as errors allow to tell
    is_above_start: Bool[Array, ""]

    @staticmethod
    def none(evaluation: Evaluation) -> "Best":
        """Before the first evaluation, from shapes: an array each, because all are donated."""

        def blank() -> Place:
            return jtu.tree_map(
                lambda s: jnp.zeros(s.shape, s.dtype) if _is_array(s) else s, evaluation.place
            )

        row = jnp.full((), -1, jnp.int32)
        dtype = evaluation.value_range[0].dtype
        highest, first = (jnp.zeros((), dtype) for _ in range(2))
        flags = [jnp.zeros((), bool) for _ in range(5)]
        return Best(blank(), highest, row, first, blank(), *flags)

    def after(self, seen: Evaluation, row: Int[Array, ""]) -> "Best":
        """The best after one more evaluation."""
        lowest, highest = seen.value_range
        is_first, comparable = self.row < 0, seen.is_comparable
        is_better = comparable & (is_first | (highest <= self.highest))
        arrays, static = eqx.partition((self.place, self.highest, self.row), eqx.is_array)
        new = eqx.filter((seen.place, highest, row), eqx.is_array)
        place, highest, row = eqx.combine(tree_where(is_better, new, arrays), static)
        first = jnp.where(is_first & comparable, highest, self.first_highest)
        return Best(
            place=place,
            highest=highest,
            row=row,
            first_highest=first,
            last=seen.place,
            is_usable=seen.is_usable,
            is_comparable=comparable,
            is_random=seen.is_random,
            is_as_good=comparable & (lowest <= highest),
            is_above_start=comparable & (lowest > first),
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


class Chosen(NamedTuple):
    """An evaluation of a run."""

    place: Place
    row: int


def choose(best: Best, values: np.ndarray, results: np.ndarray) -> tuple[Chosen, Chosen, str]:
    """What is returned of a run, the best of it, and the outcome.

    Returned is the last evaluation or, if that is above the start or not usable, the best.
    Where values cannot be compared, because x is no solution and depends on the steps
    before or on chance, theta is not judged by them: the last one is it.
    """
    last = Chosen(best.last, len(values) - 1)
    is_usable, is_comparable = bool(best.is_usable), bool(best.is_comparable)
    top, result = last, str(results[-1])
    if int(best.row) >= 0 and not best.is_as_good and (is_comparable or not is_usable):
        top = Chosen(best.place, int(best.row))
    if best.is_above_start:
        return top, top, "not_improved"
    if not is_usable:
        return top, top, result
    rise = values[-1] - values[0]
    rounding = 10 * float(jnp.finfo(best.highest.dtype).eps) * np.max(np.abs(values[[0, -1]]))
    if not is_comparable and not best.is_random and rise > rounding:
        result = "not_improved"
    return last, top, result
