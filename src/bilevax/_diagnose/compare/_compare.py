"""`compare`: rules side by side on one problem."""

from typing import Any

from jaxtyping import PyTree

from ..._checks import check_count
from ..._hypergradient._base import AbstractHypergradient
from ..._hypergradient._entry import check_types
from ..._jit import standard_promotion
from ..._problem import Bilevel, as_arrays, prepare, start_as_arrays, start_at
from ..._reach._traced import refuse_traced
from ..._tree import tree_dtype, tree_norm, tree_size
from ..measure._prospect import look_at_inner
from ..recommend._steps_choice import depends_on_path
from ._record import Comparison
from ._reference import find_reference
from ._rows import measure_curve, measure_rules
from ._rules import default_rules, find_setting, named_rules


def compare(
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    rules: Any = None,
    reference: Any = None,
    *,
    inner_solver: Any = None,
    num_steps: int | None = None,
    num_rounds: int = 7,
    verbose: bool = True,
) -> Comparison:
    """Rules side by side on your problem: error, time, memory, oracle calls.

    And the question behind them, approximate the solution or approximate the gradient? After
    k inner steps, how far is

        the derivative of  L(x_k(theta), theta)       (the exact gradient of another problem)
        and  d_theta L - B^T A^{-1} d_x L  at  x_k    (an approximate gradient of this one)

    from the exact hypergradient, and `x_k` from the solution?

    **Arguments:**

    - `problem`, `x0`, `theta`: as in `bx.hypergradient`.
    - `rules`: a list, or a dictionary of names and rules; by default `Implicit()`, its
        Neumann series of ten terms, `Unrolled()`, `Truncated`, `OneStep()` and, for few
        outer variables, `ForwardMode()`.
    - `reference`: what errors are measured against: a rule, or a gradient in the structure of
        theta. By default the implicit hypergradient at an inner solution as exact as the
        dtype allows; where theta changes the steps and not the solution, `Unrolled()`.
    - `inner_solver`: as in `bx.hypergradient`. If it is not given, or takes no steps that JAX
        sees, gradient descent with the step size 1/L (measured) stands in for it where
        steps are differentiated, and the table says so.
    - `num_steps`: of that stand-in, and of the curves.
    - `num_rounds`: how often everything is timed, in turn.
    - `verbose`: print the table.

    **Returns:** a `Comparison`: `rows`, `curve`, `plot()`, `to_records()` for a data
    frame. A rule that cannot be used has a line that says why.

    **Cost:** the compilation of every rule and of three programs more, a few seconds each;
    every rule `num_rounds` times, until four seconds are spent. Runs on the host: not for
    use under `jit`.

    **Exact when** the reference is; the record says what is known of its error.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.4) ** 2),
        )
        found = bx.compare(problem, jnp.zeros(3), jnp.array([-1.0, 0.0, 1.0]))
        found.rows[0].error
        ```

    Reference: Grazzi, Franceschi, Pontil, Salzo, "On the iteration complexity of hypergradient
    computation", 2020, theorems 2.1 and 2.2, for the two curves.
    """
    refuse_traced(
        "bx.compare",
        "Call it once, outside jit, with typical values.",
        problem=problem,
        x0=x0,
        theta=theta,
        rules=rules,
        inner_solver=inner_solver,
    )
    check_types(problem)
    check_count("compare", required=True, num_rounds=num_rounds)
    check_count("compare", num_steps=num_steps)
    named = None if rules is None else named_rules(rules)
    x0 = start_as_arrays(x0)
    problem, x0, theta = prepare(problem, x0, as_arrays(theta))
    with standard_promotion():  # theta may have leaves of several dtypes
        found = _compare(problem, x0, theta, named, reference, inner_solver, num_steps, num_rounds)
    if verbose:
        print(found)  # noqa: T201
    return found


def _compare(
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    rules: dict[str, AbstractHypergradient] | None,
    given: Any,
    inner_solver: Any,
    num_steps: int | None,
    num_rounds: int,
) -> Comparison:
    """Everything, after the door."""
    setting = find_setting(problem, x0, theta, inner_solver, num_steps)
    path = ""
    if setting.stepping is setting.solver:
        inner = look_at_inner(problem, setting.solver, x0, theta)
        path = depends_on_path(setting.solver, x0, inner)
        num_steps = inner.num_steps if num_steps is None else num_steps
    start = setting.stepping if setting.stepping is not None else setting.solver
    reference = find_reference(problem, start, x0, theta, given, path)
    if rules is None:
        rules = default_rules(setting, theta, reference)
    rows = measure_rules(problem, setting, x0, theta, rules, reference, num_rounds)
    notes = [*setting.notes, *([reference.note] if reference.note else [])]
    return Comparison(
        rows=rows,
        curve=measure_curve(problem, setting, x0, theta, reference, num_steps),
        reference=reference.name,
        reference_error=float(reference.error),
        hypergradient_norm=float(tree_norm(reference.grad)),
        kind=type(problem.inner).__name__,
        size_x=tree_size(start_at(x0, theta)),
        size_theta=tree_size(theta),
        dtype=str(tree_dtype(start_at(x0, theta))),
        notes=tuple(notes),
    )
