"""What one part of `recommend` hands to the next."""

import dataclasses
from typing import Any

from ..._hypergradient._base import AbstractHypergradient

# In inner gradients: a Hessian product of a linearised gradient is two matrix products more,
# as the gradient is, and not much dearer; a step back recomputes, and transposes.
PRODUCT = 1.2
STEP_BACK = 3.0
STEP_FORWARD_MODE = 1.4  # for each outer variable


@dataclasses.dataclass(frozen=True)
class Choice:
    """A rule and why; `wants_steps` where the steps of the solver must be differentiated."""

    rule: AbstractHypergradient
    reason: str
    warning: str = ""
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    wants_steps: bool = False
