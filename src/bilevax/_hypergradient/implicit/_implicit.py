"""Implicit differentiation: one adjoint system instead of the steps of the solver."""

import dataclasses
from typing import Any

import equinox as eqx
import lineax as lx
from jaxtyping import Scalar

from ..._checks import check_tolerance
from ..._precondition._base import AbstractPreconditioner, as_preconditioner
from .._at_solution import Adjoint, Solved
from .._base import Query
from ._evidence import with_error
from ._rule import AbstractImplicit


class Implicit(AbstractImplicit):
    """The hypergradient by the implicit function theorem.

    At the solution `residual(x, theta) = grad_x U = 0` for every theta, hence
    `A D x* + B = 0` with `A = d2_xx U`, `B = d2_x,theta U`, and

        grad = d_theta L - B^T v,    A v = d_x L

    (`A^T v = d_x L` for roots and fixed points, whose derivative is not symmetric). No
    matrix is formed, except for few variables: `A` is linearised once, `B^T v` and the
    measured residual of the adjoint system are one product.

    **Arguments:**

    - `linear_solver`: how the adjoint system is solved: one of `bx.linear`, or any Lineax
        solver. By default `Direct()` for minima in at most 32 variables, `CG()` for larger ones,
        `GMRES()` for roots and fixed points.
    - `preconditioner`: one of `bx.precondition`, or a function `(x, theta)` that returns a
        function `r -> z`, an approximation of `A^{-1} r`, symmetric and positive definite for
        CG. Where `A` is not symmetric it serves all directions: systems with `A^T` take its
        transpose, by `jax.linear_transpose`. Not to be confused with a warm start, which is a
        better first guess.
    - `inexact`: say that the inner solve is stopped early on purpose. Its residual is then
        reported and not flagged.
    - `error_estimate`: report an estimate of `||grad - exact||`, the distance to the
        hypergradient after one Newton step on x and v together. Costs two linearisations
        and two linear solves to two digits, each with two right-hand sides. `bx.Polished` takes
        that step, and `bx.Accurate` as many as an accuracy asked for needs.
    - `damping`: solve `(A + damping I) v = d_x L`. `damping_bias` reports what that costs.

    With a modulus of strong convexity (see `Minimum`) every estimate has an `error_bound`.

    Where `A` turns out to be singular, and minima move smoothly all the same, `Implicit()`
    takes the response of smallest norm: `bx.hypergradient` and `bx.solve` go over to
    `bx.MinimumNorm()`, derivatives of `bx.argmin` and of Optimistix' solvers do so by
    themselves. With a linear solver chosen by you, and in `bx.hypergradient` under your own
    `jit`, the outcome is `singular` instead. Where negative curvature is met, `x` is no
    minimum, and the outcome says so.

    What is differentiated: theta. The starting point `x0` has no influence on `x*`, and a
    dependence of `x0` on theta is ignored.

    **Cost:** one linearisation of both inner gradients, one Hessian product a step of the
    linear solver, and one pass for the cross product and the measured residual together.
    Memory of a few vectors like `x`, whatever the number of inner steps.

    **Exact when** the inner problem and the adjoint system are solved exactly and `A` is
    invertible; the error is of first order in both residuals.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Implicit(bx.linear.CG(rtol=1e-8))
        rule = bx.Implicit(error_estimate=True)
        ```

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", 2016,
    eq. (2) and algorithm 1; for `error_estimate`, Newton's method on
    `(grad_x U, A v - d_x L) = 0`.
    """

    linear_solver: lx.AbstractLinearSolver | None = None
    preconditioner: AbstractPreconditioner | None = eqx.field(
        default=None, converter=as_preconditioner
    )
    inexact: bool = False
    error_estimate: bool = False
    damping: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_tolerance("Implicit", damping=self.damping)
        if self.damping is not None and self.error_estimate:
            raise ValueError(
                "Implicit(damping=...) solves another system on purpose, whose bias "
                "`damping_bias` reports: leave out error_estimate."
            )

    @property
    def is_inexact(self) -> bool:
        return self.inexact

    @property
    def shift(self) -> Any:
        return self.damping

    def undamped(self) -> "Implicit":
        return dataclasses.replace(self, damping=None)

    @property
    def is_plain(self) -> bool:
        return not self.error_estimate and self.damping is None

    def with_error_estimate(self, wanted: bool) -> "Implicit":
        return dataclasses.replace(self, error_estimate=wanted)

    def with_evidence(self, query: Query, solved: Solved, found: Adjoint) -> tuple[Solved, Adjoint]:
        return solved, with_error(query, solved, found, self.linear_solver, self.error_estimate)
