"""`recommend`: unroll or implicit? Decided from what is measured on the problem."""

from typing import Any

from jaxtyping import PyTree

from ..._hypergradient._entry import check_types
from ..._inner._base import AbstractInnerSolver
from ..._inner._default import as_inner_solver
from ..._jit import standard_promotion
from ..._problem import Bilevel, as_arrays, prepare, start_as_arrays, start_at
from ..._reach._traced import refuse_traced
from ..._tree import tree_size
from ..measure._prospect import Inner, look_at_inner
from ._implicit_choice import choose_implicit
from ._record import Recommendation
from ._steps_choice import choose_steps, depends_on_path


def recommend(
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    *,
    inner_solver: Any = None,
    memory: float | None = None,
    rtol: float = 1e-3,
) -> Recommendation:
    """The cheapest rule that is right for a problem, and why.

    Solves the inner problem once, with the solver that is meant, and decides in this order;
    the first that is true answers:

    1. theta changes the path and not the solution (`x0` or the optimiser is a function of
       theta, or `B = d2_x,theta U` is zero and the steps still depend on theta): `Unrolled`,
       or `ForwardMode` for one or two outer variables.
    2. A fixed number of steps ends far from the solution: `Unrolled`, the derivative of what
       is run.
    3. The adjoint system is singular: `MinimumNorm`.
    4. Negative curvature: the solver's steps, where it has some, else `Implicit` by `MINRES`;
       with a warning.
    5. Otherwise `Implicit`. Its linear solver, and how exactly it must solve, are found by
       trial: the loosest tolerance whose hypergradient differs from a tight one by less
       than a third of `rtol`. Of a fixed point the Neumann series, where its contraction
       makes that cheaper. If x is less exact than `rtol` allows, `Polished`.

    **Arguments:**

    - `problem`, `x0`, `theta`, `inner_solver`: as in `bx.hypergradient`.
    - `memory`: what the derivative through steps may keep, in bytes; by default a gigabyte.
        Where the steps are the answer, but do not fit, fewer states are kept.
    - `rtol`: the relative accuracy of the hypergradient that is wanted.

    **Returns:** a `Recommendation`: `rule`, `reason`, `measured`; `print` it.

    **Cost:** one inner solve and about five hypergradients, and their compilation. Runs on
    the host between compiled parts: not for use under `jit`.

    **Exact when** theta stays in the neighbourhood: what is measured is true at one theta.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.4) ** 2),
        )
        advice = bx.recommend(problem, jnp.zeros(3), jnp.zeros(3))
        bx.hypergradient(problem, jnp.zeros(3), jnp.zeros(3), rule=advice.rule)
        ```

    Reference: Grazzi, Franceschi, Pontil, Salzo, "On the iteration complexity of hypergradient
    computation", 2020, sections 3 and 4, for the costs and errors that are compared.
    """
    check_types(problem)
    _check(problem, x0, theta, rtol, memory)
    x0 = start_as_arrays(x0)
    problem, x0, theta = prepare(problem, x0, as_arrays(theta))
    solver = as_inner_solver(inner_solver, problem.inner, start_at(x0, theta))
    with standard_promotion():  # theta may have leaves of several dtypes
        return _decide(problem, solver, inner_solver, x0, theta, memory, rtol)


def _decide(
    problem: Bilevel,
    solver: AbstractInnerSolver,
    given: Any,
    x0: PyTree,
    theta: PyTree,
    memory: float | None,
    rtol: float,
) -> Recommendation:
    """The procedure, after the one inner solve."""
    inner = look_at_inner(problem, solver, x0, theta)
    if not inner.is_finite:
        raise ValueError(
            "The inner solve ended at a NaN or an infinity, from which nothing can be "
            "recommended: start elsewhere, or take smaller steps."
        )
    measured = _measured(inner, theta)
    path = depends_on_path(solver, x0, inner)
    choice = None if path else choose_implicit(problem, solver, inner, theta, rtol)
    if choice is None or choice.wants_steps:
        choice = choose_steps(solver, inner, theta, memory, path, choice)
    return Recommendation(
        rule=choice.rule,
        inner_solver=given,
        reason=choice.reason,
        warning=choice.warning,
        measured=measured | choice.measured,
        costs=choice.costs,
    )


def _measured(inner: Inner, theta: PyTree) -> dict[str, Any]:
    return {
        "num_inner_steps": inner.num_steps,
        "contraction": inner.contraction,
        "relative_residual": inner.relative_residual,
        "size_x": tree_size(inner.x),
        "size_theta": tree_size(theta),
        "state_bytes": inner.state_bytes,
        "cross_norm": inner.cross_norm,
    }


def _check(problem: Bilevel, x0: PyTree, theta: PyTree, rtol: Any, memory: Any) -> None:
    refuse_traced(
        "bx.recommend",
        "Call it once, outside jit, with typical values, and use the rule that it finds inside.",
        problem=problem,
        x0=x0,
        theta=theta,
    )
    if not (isinstance(rtol, float) and 0 < rtol < 1):
        raise ValueError(
            f"recommend(rtol=...) is a relative accuracy between 0 and 1; got {rtol!r}."
        )
    is_number = isinstance(memory, int | float) and not isinstance(memory, bool)
    if memory is not None and not (is_number and memory > 0):
        raise ValueError(f"recommend(memory=...) is a positive number of bytes; got {memory!r}.")
