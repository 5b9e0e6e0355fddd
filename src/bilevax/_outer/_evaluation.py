"""What is known of one theta."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Scalar

from .._hypergradient._base import Estimate
from .._results import RESULTS
from .._tree import tree_norm
from ._fall_back import is_right, is_solved
from ._line_search import value_range


class Place(NamedTuple):
    """A theta that was evaluated, the x that was found there, and what came with it."""

    theta: PyTree[Array]
    x: PyTree[Array]
    aux: PyTree


class Evaluation(eqx.Module):
    """What is known of one theta. What a person sees, and what stops a run, is read here only.

    What nobody knows is `None`, in every evaluation of a run.
    """

    place: Place
    value: Scalar
    hypergradient_norm: Scalar
    inner_residual: Scalar
    adjoint_residual: Scalar | None
    error_estimate: Scalar | None
    result: RESULTS
    stats: dict[str, Array]  # all oracle calls since the last evaluation
    is_usable: Bool[Array, ""]  # theta may move on it
    is_comparable: Bool[Array, ""]  # usable, and its value is that of a function of theta
    is_random: Bool[Array, ""]  # its value is that of a random function
    value_range: tuple[Scalar, Scalar]  # where that function is, as far as errors are known
    should_stop: Bool[Array, ""]  # the method itself says that it finishes with the next step
    gave_up: Bool[Array, ""]  # the method cannot go on from here
    predicted_decrease: Scalar | None  # of the value, by the optimiser's model, in its next step
    proposal: PyTree  # the method's own, for its next step

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        theta: PyTree,
        *,
        usable: Bool[Array, ""] | None = None,
        is_function: bool = False,
        **others: Any,
    ) -> "Evaluation":
        """What an estimate at `theta` says; `others` are fields that it does not know.

        `usable` where the method knows better than the outcome. `is_function`: the value is
        one of theta alone although x need not be a solution.
        """
        usable = is_right(estimate) if usable is None else usable
        no = jnp.zeros((), bool)
        fields: dict[str, Any] = {
            "place": Place(theta, estimate.x, estimate.aux),
            "value": estimate.value,
            "hypergradient_norm": tree_norm(estimate.grad),
            "inner_residual": estimate.inner_residual,
            "adjoint_residual": estimate.adjoint_residual,
            "error_estimate": estimate.error_estimate,
            "result": estimate.result,
            "stats": estimate.stats,
            "is_usable": usable,
            "is_comparable": usable & (is_solved(estimate) | is_function),
            "is_random": no,
            "value_range": value_range(estimate),
            "should_stop": no,
            "gave_up": no,
            "predicted_decrease": None,
            "proposal": None,
        }
        return cls(**{**fields, **others})
