"""bilevax: bilevel optimization in JAX."""

from ._problem import (
    Bilevel as Bilevel,
    FixedPoint as FixedPoint,
    LeastSquares as LeastSquares,
    Minimum as Minimum,
    Root as Root,
)
from ._results import RESULTS as RESULTS
