"""The hypergradient after one Newton step on x and v together."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from ..._precondition._base import AbstractPreconditioner, as_preconditioner
from ..._results import RESULTS
from ..._tree import default_rtol
from .._at_solution import Adjoint, Solved
from .._base import Query
from .._point import point
from ._evidence import bound_at, error_before, newton_step
from ._rule import AbstractImplicit


class Polished(AbstractImplicit):
    """The hypergradient of `bx.Implicit()` after one Newton step on x and v together.

    With `x <- x - A^{-1} grad_x U` and `v` solved for there, the error of the hypergradient is of
    second order in the errors of x and v. `error_estimate` is that of the hypergradient before
    the step: how far the step moved it.

    **Arguments:**

    - `linear_solver`, `preconditioner`: as in `bx.Implicit`. With at most 256 variables the
        step is taken with a factorisation of `A`.
    - `inexact`: as in `bx.Implicit`: x is stopped early on purpose, and only the step tells
        whether it is near enough.

    In `bx.argmin`, and as an adjoint of Optimistix, x is what the inner solver returned, and the
    rule is `bx.Implicit`.

    **Cost:** that of `bx.Implicit`, and two linearisations and two linear solves, each with two
    right-hand sides.

    **Exact when** the inner problem is quadratic and the linear systems are solved exactly,
    wherever x is. Flagged `inner_not_converged` where Newton's method does not contract.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Polished(bx.linear.CG(rtol=1e-3))
        ```

    Reference: Newton's method on `(grad_x U, A v - d_x L) = 0`.
    """

    linear_solver: lx.AbstractLinearSolver | None = None
    preconditioner: AbstractPreconditioner | None = eqx.field(
        default=None, converter=as_preconditioner
    )
    inexact: bool = False

    @property
    def is_inexact(self) -> bool:
        return self.inexact

    def with_error_estimate(self, wanted: bool) -> "Polished":
        del wanted  # it always has one
        return self

    def with_evidence(self, query: Query, solved: Solved, found: Adjoint) -> tuple[Solved, Adjoint]:
        problem, theta = query.problem, query.theta
        rtol = default_rtol(solved.inner.x)
        s, counts = newton_step(query, solved, found, self.linear_solver, rtol)
        late = RESULTS.where(s.is_contracting, RESULTS.successful, RESULTS.inner_not_converged)
        result = RESULTS.where(s.result == RESULTS.successful, late, s.result)
        result = RESULTS.where(jnp.isfinite(s.change), result, RESULTS.nonfinite)
        evidence = {"error_estimate": error_before(s), "adjoint_residual": s.adjoint_residual}
        found = found._replace(grad=s.grad, v=s.v, results=(*found.results, result))
        found = found.with_evidence(evidence, counts, s.num_steps)
        found = found.with_evidence(*bound_at(problem, s.x, s.next_x, theta, s.v))
        inner = dataclasses.replace(solved.inner, x=s.x, residual=s.inner_residual)
        return Solved(inner, solved.inner_state, point(problem, s.x, theta)), found
