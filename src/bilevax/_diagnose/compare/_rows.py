"""What `compare` measures of each rule, and of the inner steps."""

from typing import Any

from jaxtyping import PyTree

from ..._as_written import as_written
from ..._hypergradient._base import AbstractHypergradient
from ..._inner._base import AbstractInnerSolver
from ..._problem import Bilevel
from ..._results import RESULTS
from ..measure._costs import Program, compile_forward, compile_rule, time_in_turn
from ..measure._prospect import relative_difference
from ._curves import error_curve
from ._record import ErrorCurve, MeasuredRule
from ._reference import Reference
from ._rules import Setting

_MAX_CURVE_STEPS = 1000


def measure_rules(
    problem: Bilevel,
    setting: Setting,
    x0: PyTree,
    theta: PyTree,
    rules: dict[str, AbstractHypergradient],
    reference: Reference,
    num_rounds: int,
) -> tuple[MeasuredRule, ...]:
    """Compile everything, then time it in turn."""
    programs: dict[Any, Program] = {}
    failures: dict[str, str] = {}
    solvers: dict[str, tuple[AbstractInnerSolver, PyTree]] = {}
    for name, rule in rules.items():
        through_steps = rule.needs_steps
        if through_steps and setting.stepping is not None:
            solvers[name] = setting.stepping, x0
        else:
            solvers[name] = setting.solver, setting.x0
        solver, start = solvers[name]
        try:
            programs[name] = compile_rule(problem, solver, rule, start, theta)
        except (TypeError, ValueError, NotImplementedError) as error:
            failures[name] = _first_sentence(error)
    for solver, start in solvers.values():
        if id(solver) not in programs:
            programs[id(solver)] = compile_forward(problem, solver, start, theta)
    seconds = time_in_turn(programs, num_rounds)
    rows = []
    for name in rules:
        solver = solvers[name][0]
        label = as_written(solver).replace("bx.", "")
        if name in failures:
            rows.append(MeasuredRule(name, label, message=failures[name]))
            continue
        grad, code, stats = programs[name].output
        counts: dict[str, Any] = {key: int(value) for key, value in stats.items()}
        forward, whole = seconds[id(solver)], seconds[name]
        host = setting.host_seconds or 0.0 if solver is setting.solver else 0.0
        rows.append(
            MeasuredRule(
                name=name,
                inner_solver=label,
                error=relative_difference(grad, reference.grad),
                forward_seconds=forward + host,
                backward_seconds=max(whole - forward, 0.0),
                memory_bytes=programs[name].memory_bytes,
                outcome=RESULTS(code).name,
                **counts,
            )
        )
    return tuple(rows)


def measure_curve(
    problem: Bilevel,
    setting: Setting,
    x0: PyTree,
    theta: PyTree,
    reference: Reference,
    num_steps: int | None,
) -> ErrorCurve | None:
    solver = setting.stepping
    if solver is None:
        return None
    num_steps = solver.max_steps if num_steps is None else num_steps
    num_steps = max(min(num_steps, _MAX_CURVE_STEPS), 1)
    name = as_written(solver).replace("bx.", "")
    return error_curve(problem, solver, name, x0, theta, num_steps, reference.x, reference.grad)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") + "."
