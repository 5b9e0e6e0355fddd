"""Where the steps of the inner solver are what must be differentiated."""

from typing import Any

from jaxtyping import PyTree

from ..._hypergradient._base import AbstractHypergradient
from ..._hypergradient.unrolled._forward_mode import ForwardMode
from ..._hypergradient.unrolled._unrolled import Unrolled
from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver
from ..._loop._budget import MemoryBudget
from ..._problem import is_start_function
from ..._tree import tree_size
from ..measure._prospect import Inner
from ._choice import STEP_BACK, STEP_FORWARD_MODE, Choice

_MEMORY = 1e9  # if nothing was said
_MAX_FORWARD = 2  # outer variables up to which forward mode costs less than reverse mode


def depends_on_path(solver: AbstractInnerSolver, x0: PyTree, inner: Inner) -> str:
    """Why the hypergradient belongs to the steps and not to the solution; empty if not."""
    if not isinstance(solver, AbstractSteppingSolver):
        return ""
    # A solver that goes on until it has converged forgets where it began.
    if is_start_function(x0) and (solver.is_fixed_length or inner.cross_norm == 0):
        return "the start of the inner steps is a function of theta"
    if solver.may_use_theta:
        return "the inner optimiser is a function of theta"
    if inner.cross_norm == 0 and inner.moves_steps:
        return "theta changes the steps and not the solution (the cross term B is zero)"
    return ""


def choose_steps(
    solver: AbstractInnerSolver,
    inner: Inner,
    theta: PyTree,
    memory: float | None,
    path: str,
    implicit: Choice | None,
) -> Choice:
    """`Unrolled` with what fits into the memory, or forward mode for few outer variables."""
    assert isinstance(solver, AbstractSteppingSolver)
    num_steps, num_outer = solver.max_steps, tree_size(theta)
    costs = {"Unrolled": STEP_BACK * num_steps}
    why = path if implicit is None else implicit.reason
    warning = "" if implicit is None else implicit.warning
    measured: dict[str, Any] = {} if implicit is None else implicit.measured
    costs["ForwardMode"] = STEP_FORWARD_MODE * num_outer * num_steps
    states = num_steps * inner.state_bytes
    if num_outer <= _MAX_FORWARD:
        rule: AbstractHypergradient = ForwardMode()
        reason = f"{why}, and forward mode is cheaper than reverse for {num_outer} outer variable"
        reason += "s" if num_outer > 1 else ""
    elif memory is not None:
        rule = Unrolled(checkpoints=MemoryBudget(int(memory)))
        reason = f"{why}; of {num_steps:,} states ({_size(states)}) as many are kept as fit"
    elif states <= _MEMORY:
        rule = Unrolled(checkpoints="all")
        reason = f"{why}; all {num_steps:,} states take {_size(states)}, so none is computed twice"
    else:
        rule = Unrolled()
        reason = f"{why}; {num_steps:,} states would take {_size(states)}, so few are kept"
    return Choice(rule, reason, warning, measured, costs)


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
