"""`check`: what is true of a problem at a point."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import PyTree

from ..._checks import check_count
from ..._hypergradient._base import AbstractHypergradient
from ..._hypergradient._entry import check_types
from ..._hypergradient.implicit._implicit import Implicit
from ..._inner._default import as_inner_solver
from ..._inner._newton_cg import NewtonCG
from ..._jit import standard_promotion
from ..._linear import GMRES
from ..._problem import AbstractCondition, Bilevel, as_arrays, is_start_function, prepare
from ..._reach._traced import refuse_traced
from ..._tree import tree_dtype, tree_size
from ..measure._spectrum import DENSE_SIZE
from ._assemble import assemble
from ._reasons import most_likely_reason
from ._record import Check


def check(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    *,
    inner_solver: Any = None,
    rule: AbstractHypergradient | None = None,
    num_directions: int = 3,
    max_lanczos_steps: int = 30,
    verbose: bool = True,
) -> Check:
    """What is true of a problem at a point, and whether its hypergradient can be trusted.

    Looks at the inner residual, the extreme eigenvalues of `A = d2_xx U`, what they mean for
    the dtype and for step sizes, whether the derivatives are those of the values, and
    whether the hypergradient agrees with central differences of

        F(theta) = L(x*(theta), theta),

    the inner problem solved again at every point. If not, says the most likely reason.

    **Arguments:**

    - `problem`: a `Bilevel`.
    - `x`: the inner solution that you have; the start of the inner steps for rules that
        differentiate through them.
    - `theta`: the outer variable.
    - `inner_solver`: how the inner problem is solved again; by default as far as the dtype
        goes. Give your own to find out what it does to the hypergradient.
    - `rule`: the rule under test, `bx.Implicit()` by default.
    - `num_directions`: how many pseudo-random directions, beside the hypergradient itself.
    - `max_lanczos_steps`: how far the spectrum is looked at above 200 variables. As many
        vectors like `x` are kept: 30 of 1e6 variables in float64 are 240 MB.
    - `verbose`: print the report.

    **Returns:** a `Check`, with `ok`, `reason` and everything that was measured.

    **Cost:** two hypergradients, four inner solves for each direction (more if a step has to
    be searched for), about 100 products; up to 200 variables the matrix `A`. Runs on the
    host between compiled parts: not for use under `jit`.

    **Exact when** the differences resolve it: in float64 to about nine digits, in float32 to
    two or three. Eigenvalues are exact up to 200 variables; above that the smallest is an
    upper estimate.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.4) ** 2),
        )
        found = bx.check(problem, x=jnp.full(3, 0.5), theta=jnp.zeros(3))
        assert found.ok, found.reason
        ```

    Reference: Parlett, "The symmetric eigenvalue problem", 1998, section 13.2, for the
    eigenvalues.
    """
    refuse_traced(
        "bx.check",
        "Call it once, outside jit, with typical values; inside, the estimate of "
        "bx.hypergradient(..., throw=False) holds its own evidence.",
        problem=problem,
        x=x,
        theta=theta,
        rule=rule,
        inner_solver=inner_solver,
    )
    check_types(problem, rule)
    check_count("check", required=True, max_lanczos_steps=max_lanczos_steps)
    if (
        isinstance(num_directions, bool)
        or not isinstance(num_directions, int)
        or num_directions < 0
    ):
        raise ValueError(f"check(num_directions=...) must be 0 or more; got {num_directions!r}.")
    if is_start_function(x):
        raise TypeError("`x` is a point to be checked, not a function of theta: give x0(theta).")
    problem, x, theta = prepare(problem, as_arrays(x), as_arrays(theta))
    rule = Implicit() if rule is None else rule
    solver = tight_solver(problem.inner, x) if inner_solver is None else inner_solver
    with standard_promotion():  # theta may have leaves of several dtypes
        found = assemble(problem, x, theta, solver, rule, num_directions, max_lanczos_steps)
    reason = most_likely_reason(found)
    found = dataclasses.replace(found, reason=reason, ok=not reason)
    if verbose:
        print(found)  # noqa: T201
    return found


def tight_solver(condition: AbstractCondition, x: PyTree) -> Any:
    """Solves as far as the dtype goes, and a little short of where it stalls."""
    tolerance = 1e-12 if tree_dtype(x) == jnp.float64 else 1e-6
    if condition.objective is not None:
        return NewtonCG(rtol=tolerance)
    if condition.nonsmooth is not None or condition.has_inequalities:
        return as_inner_solver(None, condition, x).with_rtol(jnp.asarray(tolerance, tree_dtype(x)))
    if tree_size(x) <= DENSE_SIZE:
        return optx.Newton(rtol=tolerance, atol=tolerance)
    linear_solver = GMRES(rtol=1e-4)
    return optx.Newton(rtol=tolerance, atol=tolerance, linear_solver=linear_solver)
