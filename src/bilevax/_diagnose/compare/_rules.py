"""Which rules `compare` looks at, and with which inner solver."""

import time
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import PyTree

from ..._as_written import as_written
from ..._hypergradient._base import AbstractHypergradient
from ..._hypergradient.implicit._implicit import Implicit
from ..._hypergradient.implicit._minimum_norm import MinimumNorm
from ..._hypergradient.k_steps._one_step import OneStep
from ..._hypergradient.unrolled._forward_mode import ForwardMode
from ..._hypergradient.unrolled._truncated import Truncated
from ..._hypergradient.unrolled._unrolled import Unrolled
from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver
from ..._inner._default import as_inner_solver
from ..._inner._descent import Descent
from ..._linear import Neumann
from ..._problem import Bilevel, start_at
from ..._tree import tree_size
from ..measure._prospect import look_at_inner
from ..measure._spectrum import spectrum
from ._reference import Reference

_LANCZOS_STEPS = 20
_MAX_STAND_IN = 500
_FEW_OUTER = 8  # outer variables up to which forward mode is shown by itself


class Setting(NamedTuple):
    """With what the rules are run."""

    x0: PyTree  # for the solver that was given
    solver: AbstractInnerSolver
    stepping: AbstractSteppingSolver | None  # for rules through steps
    host_seconds: float | None  # of a black box, which ran once
    notes: tuple[str, ...]


def find_setting(
    problem: Bilevel, x0: PyTree, theta: PyTree, inner_solver: Any, num_steps: int | None
) -> Setting:
    start, seconds = start_at(x0, theta), None
    solver = as_inner_solver(inner_solver, problem.inner, start)
    began = time.perf_counter()
    solver, found = solver.before(problem.inner, start, theta)
    if found is not start:  # the host has solved for x: that is time of every rule
        seconds, x0, start = time.perf_counter() - began, found, found
    is_chosen = inner_solver is not None or problem.inner.objective is None
    if is_chosen and isinstance(solver, AbstractSteppingSolver):
        return Setting(x0, solver, solver, seconds, ())
    stand_in = _stand_in(problem, start, theta, num_steps)
    if stand_in is None:
        return Setting(x0, solver, None, seconds, ())
    note = (
        f"rules through steps, and the curve: {stand_in.num_steps} steps of gradient descent with "
        f"step size 1/L stand in for {as_written(inner_solver or solver)}."
    )
    return Setting(x0, solver, stand_in, seconds, (note,))


def _stand_in(problem: Bilevel, x: PyTree, theta: PyTree, num_steps: int | None) -> Descent | None:
    """Gradient descent with the step size 1/L; as many steps as seven digits of x take."""
    if problem.inner.objective is None:
        return None
    solution = look_at_inner(problem, as_inner_solver(None, problem.inner, x), x, theta).x
    ends = spectrum(problem, solution, theta, _LANCZOS_STEPS)
    # The curvature of the start counts too: the first steps are taken there.
    largest = max(ends.largest, spectrum(problem, x, theta, _LANCZOS_STEPS).largest)
    if not (np.isfinite(largest) and largest > 0):
        return None
    if num_steps is None:
        condition = ends.condition if np.isfinite(ends.condition) else 100.0
        num_steps = int(np.clip(np.ceil(16 * condition), 20, _MAX_STAND_IN))
    return Descent(optax.sgd(1 / (1.05 * largest)), num_steps=num_steps)


def default_rules(
    setting: Setting, theta: PyTree, reference: Reference
) -> dict[str, AbstractHypergradient]:
    """What applies to the problem and the solver."""
    rules: list[AbstractHypergradient] = [Implicit(), Implicit(Neumann(10))]
    if reference.is_singular:
        rules.insert(0, MinimumNorm())
    stepping = setting.stepping
    if stepping is not None:
        half = max(min(stepping.max_steps // 2, 20), 1)
        rules += [Unrolled(), Truncated(half)]
        if tree_size(theta) <= _FEW_OUTER:
            rules.append(ForwardMode())
    rules.append(OneStep())
    return named_rules(rules)


def named_rules(rules: Any) -> dict[str, AbstractHypergradient]:
    """Names and rules, checked."""
    if isinstance(rules, AbstractHypergradient):
        rules = [rules]
    if not isinstance(rules, dict):
        names = [as_written(rule).replace("bx.", "") for rule in rules]
        rules = dict(zip(names, rules, strict=True))
    for rule in rules.values():
        _check_rule(rule)
    if not rules:
        raise ValueError("compare(rules=...) has no rule in it.")
    return rules


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, AbstractHypergradient):
        raise TypeError(
            "compare(rules=...) takes rules such as bx.Implicit() and bx.Unrolled(), in a list or "
            f"a dictionary; got {type(rule).__name__}."
        )
