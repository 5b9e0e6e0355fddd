"""The bilevel problem, and the conditions that define `x*(theta)`."""

from ._bilevel import Bilevel as Bilevel
from ._condition import (
    AbstractCondition as AbstractCondition,
    FixedPoint as FixedPoint,
    LeastSquares as LeastSquares,
    Minimum as Minimum,
    Root as Root,
)
from ._constrained import ConstrainedMinimum as ConstrainedMinimum, PrimalDual as PrimalDual
from ._door import (
    as_arrays as as_arrays,
    bind as bind,
    check_values as check_values,
    in_both_modes as in_both_modes,
    is_start_function as is_start_function,
    prepare as prepare,
    restore as restore,
    start_as_arrays as start_as_arrays,
    start_at as start_at,
    strong_convexity as strong_convexity,
)
from ._linearised import Linearised as Linearised
from ._proximal import ProximalMinimum as ProximalMinimum
from ._quadratic_program import QP as QP
