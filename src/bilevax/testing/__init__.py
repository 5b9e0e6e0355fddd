"""Problems whose answers are known exactly, to test bilevax and code built on it.

Not imported by `import bilevax`: write `import bilevax.testing`.
"""

from typing import Any

from ._base import (
    Oracle as Oracle,
    Reference as Reference,
    cosine_matrix as cosine_matrix,
    relative_error as relative_error,
)
from ._equations import fixed_point as fixed_point, root as root, scalar_root as scalar_root
from ._least_squares import (
    data_weights as data_weights,
    overparameterised as overparameterised,
)
from ._logistic import logistic as logistic
from ._nested import nested as nested
from ._quadratic import (
    quadratic as quadratic,
    quadratic_game as quadratic_game,
    scalar_game as scalar_game,
)
from ._ridge import (
    EVEN_FREQUENCIES as EVEN_FREQUENCIES,
    least_squares as least_squares,
    ridge as ridge,
    ridge_log_lambda as ridge_log_lambda,
)
from ._unrolled import (
    UnrolledOracle as UnrolledOracle,
    learned_step_size as learned_step_size,
)


def all_oracles(dtype: Any = float) -> list[Oracle]:
    """Every `Oracle` in its default size, for tests that run over all of them.

    Select by `oracle.kind`, `oracle.is_strongly_convex` and `oracle.size`. Only
    `overparameterised` has a singular adjoint system.
    """
    builders = (
        scalar_game,
        quadratic,
        quadratic_game,
        nested,
        ridge,
        least_squares,
        ridge_log_lambda,
        logistic,
        data_weights,
        scalar_root,
        fixed_point,
        root,
        overparameterised,
    )
    return [build(dtype) for build in builders]
