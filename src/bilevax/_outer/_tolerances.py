"""How exactly to solve both systems at which outer step."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Scalar

from .._as_written import OneLine
from .._checks import check_tolerance
from .._hypergradient._base import AbstractHypergradient
from .._inner._base import AbstractInnerSolver
from .._problem import AbstractCondition
from .._tree import default_rtol, tree_dtype


class AbstractToleranceSchedule(OneLine, eqx.Module):
    """Relative tolerances of the inner solve and of the adjoint system, step by step."""

    @abc.abstractmethod
    def tolerances(self, step: Int[Array, ""], x: PyTree) -> tuple[Scalar, Scalar]:
        """Both tolerances at outer step `step`, from 0, in the dtype of `x`. Traced."""


class ExponentialTolerance(AbstractToleranceSchedule):
    """Both tolerances fall geometrically: `max(initial * rate^k, floor)` at outer step `k`.

    Goes into `bx.DoubleLoop(tolerances=...)`. The first outer steps are long and need only
    a direction; the last ones need digits. The sum of all tolerances is finite, which is
    what convergence to a stationary point asks for.

    **Arguments:**

    - `initial`: the tolerance at the first step.
    - `rate`: the factor from one outer step to the next, below 1.
    - `floor`: the smallest tolerance; by default 1e-6 in float64 and 1e-4 below.

    !!! example

        ```python
        import bilevax as bx

        method = bx.DoubleLoop(tolerances=bx.ExponentialTolerance(initial=1e-1))
        ```

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", 2016,
    theorem 2 and section 5.1.
    """

    initial: float | Scalar = 1e-1
    rate: float | Scalar = 0.9
    floor: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_tolerance("ExponentialTolerance", initial=self.initial, floor=self.floor)
        if isinstance(self.rate, int | float) and not 0 < self.rate < 1:
            raise ValueError(
                f"ExponentialTolerance(rate=...) must be between 0 and 1; got {self.rate}."
            )

    def tolerances(self, step: Int[Array, ""], x: PyTree) -> tuple[Scalar, Scalar]:
        dtype = tree_dtype(x)
        factor = jnp.asarray(self.rate, dtype) ** step.astype(dtype)
        return _both(self.initial, factor, self.floor, x)


class PolynomialTolerance(AbstractToleranceSchedule):
    """Both tolerances fall as a power: `max(initial / (k + 1)^power, floor)` at outer step `k`.

    Goes into `bx.DoubleLoop(tolerances=...)`; `power=2` and `power=3` are the quadratic
    and the cubic schedule of HOAG. Falls faster than `ExponentialTolerance` at first and
    more slowly in the end.

    **Arguments:**

    - `initial`: the tolerance at the first step.
    - `power`: above 1, for the sum of all tolerances to be finite.
    - `floor`: the smallest tolerance; by default 1e-6 in float64 and 1e-4 below.

    !!! example

        ```python
        import bilevax as bx

        method = bx.DoubleLoop(tolerances=bx.PolynomialTolerance(power=3))
        ```

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", 2016,
    theorem 2 and section 5.1.
    """

    initial: float | Scalar = 1e-1
    power: float | Scalar = 2.0
    floor: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_tolerance("PolynomialTolerance", initial=self.initial, floor=self.floor)
        if isinstance(self.power, int | float) and not self.power > 1:
            raise ValueError(f"PolynomialTolerance(power=...) must exceed 1; got {self.power}.")

    def tolerances(self, step: Int[Array, ""], x: PyTree) -> tuple[Scalar, Scalar]:
        dtype = tree_dtype(x)
        factor = (step.astype(dtype) + 1) ** (-jnp.asarray(self.power, dtype))
        return _both(self.initial, factor, self.floor, x)


def _both(initial: Any, factor: Scalar, floor: Any, x: PyTree) -> tuple[Scalar, Scalar]:
    floor = default_rtol(x) if floor is None else floor
    dtype = tree_dtype(x)
    tolerance = jnp.maximum(jnp.asarray(initial, dtype) * factor, jnp.asarray(floor, dtype))
    return tolerance, tolerance


def at_tolerances(
    solver: AbstractInnerSolver,
    rule: AbstractHypergradient,
    condition: AbstractCondition,
    x: PyTree,
    tolerances: tuple[Scalar, Scalar],
) -> tuple[AbstractInnerSolver, Any]:
    """Inner solver and rule with these tolerances, or an error that says why not."""
    inner_rtol, linear_rtol = tolerances
    told = solver.with_rtol(inner_rtol)
    if told is None:
        raise TypeError(
            f"Tolerances cannot be chosen for {type(solver).__name__}: it takes a fixed number "
            "of steps, or it is a black box. Use bx.NewtonCG(), bx.LBFGS(), "
            "bx.Descent(..., rtol=...) or an Optimistix solver."
        )
    new_rule = rule.with_linear_rtol(linear_rtol, condition, x)
    if new_rule is None:
        raise TypeError(
            "Tolerances can be chosen for the rule bx.Implicit(), and not for one that has none or "
            f"chooses them itself; got {type(rule).__name__}."
        )
    return told, new_rule
