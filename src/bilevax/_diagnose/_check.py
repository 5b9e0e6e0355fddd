"""`check`: what is true of a problem at a point."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import PyTree

from .._hypergradient._base import AbstractHypergradient, Estimate
from .._hypergradient._entry import check_types, hypergradient
from .._hypergradient._implicit import Implicit
from .._hypergradient._minimum_norm import MinimumNorm
from .._inner._external import Given
from .._inner._newton_cg import NewtonCG
from .._linear import GMRES
from .._linear._common import check_count
from .._problem import AbstractCondition, Bilevel, as_arrays, objective, prepare
from .._results import RESULTS
from .._tree import (
    default_rtol,
    is_traced,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_sub,
    tree_zeros_like,
)
from ._agreement import compare_directions
from ._base import Check
from ._differences import gaussian, relative
from ._measurements import AtPoint, Solved, at_point, constants, newton_step, solve_again
from ._reasons import most_likely_reason
from ._self_check import self_check
from ._spectrum import DENSE_SIZE, Spectrum, spectrum


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
    check_types(problem, rule)
    check_count("check", required=True, max_lanczos_steps=max_lanczos_steps)
    if (
        isinstance(num_directions, bool)
        or not isinstance(num_directions, int)
        or num_directions < 0
    ):
        raise ValueError(f"check(num_directions=...) must be 0 or more; got {num_directions!r}.")
    if is_traced((problem, x, theta)):
        raise TypeError("bx.check runs on the host: call it outside jit, grad and vmap.")
    if callable(x):
        raise TypeError("`x` is a point to be checked, not a function of theta: give x0(theta).")
    problem, x, theta = prepare(problem, as_arrays(x), as_arrays(theta))
    rule = Implicit() if rule is None else rule
    solver = tight_solver(problem.inner, x) if inner_solver is None else inner_solver
    found = _measure(problem, x, theta, solver, rule, num_directions, max_lanczos_steps)
    reason = most_likely_reason(found)
    found = dataclasses.replace(found, reason=reason, ok=not reason)
    if verbose:
        print(found)  # noqa: T201
    return found


def tight_solver(condition: AbstractCondition, x: PyTree) -> Any:
    """Solves as far as the dtype goes, and a little short of where it stalls."""
    tolerance = 1e-12 if tree_dtype(x) == jnp.float64 else 1e-6
    if objective(condition) is not None:
        return NewtonCG(rtol=tolerance)
    if tree_size(x) <= DENSE_SIZE:
        return optx.Newton(rtol=tolerance, atol=tolerance)
    linear_solver = GMRES(rtol=1e-4)
    return optx.Newton(rtol=tolerance, atol=tolerance, linear_solver=linear_solver)


def _measure(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    solver: Any,
    rule: AbstractHypergradient,
    num_directions: int,
    max_lanczos_steps: int,
) -> Check:
    # 1. the hypergradient, at the polished x
    polished = solve_again(problem, solver, x, theta)
    here = at_point(problem, x, polished.x, theta)
    ends = spectrum(problem, x, theta, max_lanczos_steps)
    is_implicit = isinstance(rule, (Implicit, MinimumNorm))
    if is_implicit:
        start = polished.x
        estimate = _estimate(problem, start, theta, Given(), rule)
        at_x = _estimate(problem, x, theta, Given(), rule)
    else:  # the rule's objective begins at x, and knows no polished one
        start = x
        estimate = at_x = _estimate(problem, x, theta, solver, rule)
    # 2. the differences
    kink, wrong = self_check(problem, x, theta, here)
    agreement = compare_directions(problem, solver, start, theta, estimate, num_directions)
    is_resolved = agreement.resolved_residual <= default_rtol(x)
    if agreement.has_kink and is_resolved and not (kink or wrong or agreement.jumps):
        kink = "outer objective at the inner solution, along theta"
    # 3. the constants
    v = tree_zeros_like(x) if estimate.v is None else estimate.v
    starts = gaussian(x, 4), gaussian(theta, 5)
    cross, smoothness = constants(problem, polished.x, theta, v, *starts)
    norm = float(tree_norm(estimate.grad))
    return Check(
        rule=type(rule).__name__,
        is_implicit=is_implicit,
        **_of_point(problem, x, theta, here),
        **_of_spectrum(ends, float(jnp.finfo(tree_dtype(x)).eps)),
        distance=newton_step(problem, x, theta, here.residual, ends.matrix),
        cross_norm=_unless_rounding(float(cross), here, polished),
        adjoint_smoothness=float(smoothness),
        value=float(estimate.value),
        hypergradient_norm=norm,
        adjoint_residual=float(estimate.adjoint_residual),
        outcome=_name(estimate.result),
        comparisons=agreement.comparisons,
        disagreement=max((row.gap for row in agreement.comparisons), default=0.0),
        moved=float(polished.moved),
        error_at_x=relative(tree_norm(tree_sub(at_x.grad, estimate.grad)), norm),
        resolved_residual=agreement.resolved_residual,
        kink=kink,
        wrong_derivative=wrong,
        jumps=agreement.jumps,
        is_finite=bool(here.is_finite)
        and all(np.isfinite([norm, ends.largest, float(polished.value), float(polished.residual)])),
    )


def _estimate(
    problem: Bilevel, x: PyTree, theta: PyTree, solver: Any, rule: AbstractHypergradient
) -> Estimate:
    return hypergradient(problem, x, theta, inner_solver=solver, rule=rule, throw=False)[0]


def _of_point(problem: Bilevel, x: PyTree, theta: PyTree, here: AtPoint) -> dict[str, Any]:
    rtol = default_rtol(x)
    return {
        "kind": type(problem.inner).__name__,
        "dtype": str(tree_dtype(x)),
        "size_x": tree_size(x),
        "size_theta": tree_size(theta),
        "inner_residual": float(here.residual_norm),
        "inner_scale": float(here.scale),
        "inner_tolerance": rtol * float(here.scale),
        "rtol": rtol,
        "x_norm": float(here.x_norm),
        "direct_norm": float(here.direct_norm),
    }


def _of_spectrum(ends: Spectrum, eps: float) -> dict[str, Any]:
    lipschitz = max(abs(ends.smallest), abs(ends.largest)) + ends.largest_uncertainty
    return {
        "curvature": ends.verdict,
        **{key: value for key, value in ends._asdict().items() if key not in {"verdict", "matrix"}},
        "eps": eps,
        "attainable": ends.condition * eps,
        "lipschitz": lipschitz,
        "step_size": 1 / lipschitz if lipschitz > 0 else float("nan"),
    }


def _unless_rounding(cross_norm: float, here: AtPoint, polished: Solved) -> float:
    """`||B||`, or zero where theta moves the inner residual by no more than its rounding."""
    eps = float(jnp.finfo(here.scale.dtype).eps)
    rounding = float(polished.residual) + 100 * eps * float(polished.scale)
    return cross_norm if cross_norm * max(float(here.theta_norm), 1.0) > 10 * rounding else 0.0


def _name(result: RESULTS) -> str:
    """The name of an outcome."""
    code = int(np.asarray(result._value))
    return next(name for name, item in RESULTS._name_to_item.items() if int(item._value) == code)
