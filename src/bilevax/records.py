"""What `check`, `compare`, `recommend` and `jacobian` return: to read, and for annotations."""

from ._diagnose.check._record import (
    Check,
    DirectionalDerivative,
)
from ._diagnose.compare._record import (
    Comparison,
    ErrorCurve,
    MeasuredRule,
)
from ._diagnose.recommend._record import Recommendation
from ._hypergradient._jacobian import Jacobian

__all__ = [
    "Check",
    "Comparison",
    "DirectionalDerivative",
    "ErrorCurve",
    "Jacobian",
    "MeasuredRule",
    "Recommendation",
]
