"""A call of Optimistix, as its adjoints are given it: the only reader of its private layout."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree

from .._tree import lax_while_loop, stop_gradient

_SOLVER, _X0, _MAX_STEPS = 1, 2, 5  # places in `inputs`


class Call(NamedTuple):
    """`optx.minimise(fn, solver, y0, ...)` or one of its siblings, not yet run.

    `rewrite_fn(x, rest, inputs)` is zero at its result. `inputs` hold everything that may
    be differentiated, the solver and its options included.
    """

    primal_fn: Callable[[PyTree], tuple[PyTree, PyTree]]
    rewrite_fn: Callable[[PyTree, PyTree, PyTree], PyTree]
    inputs: tuple

    @property
    def kind(self) -> str:
        """`minimise`, `least_squares`, `root_find` or `fixed_point`."""
        return self.rewrite_fn.__module__.rpartition("._")[2]

    @property
    def is_symmetric(self) -> bool:
        """Whether the residual is a gradient."""
        return self.kind in ("minimise", "least_squares")

    @property
    def solver(self) -> Any:
        return self.inputs[_SOLVER]

    @property
    def x0(self) -> PyTree:
        return self.inputs[_X0]

    @property
    def max_steps(self) -> int | None:
        return self.inputs[_MAX_STEPS]

    def at_most(self, max_steps: int | None) -> "Call":
        """The call with no more than `max_steps` steps."""
        if max_steps is None:
            return self
        most = max_steps if self.max_steps is None else min(max_steps, self.max_steps)
        return self._replace_input(_MAX_STEPS, most)

    def with_constant_solver(self) -> "Call":
        return self._replace_input(_SOLVER, stop_gradient(self.solver))

    def _replace_input(self, place: int, value: Any) -> "Call":
        inputs = (*self.inputs[:place], value, *self.inputs[place + 1 :])
        return self._replace(inputs=inputs)

    def run(self, inputs: PyTree, loop: Callable = lax_while_loop) -> tuple[PyTree, PyTree]:
        """`x` and the rest of what the call returns, its steps taken by `loop`."""
        return self.primal_fn((*inputs, loop))

    def constant(self) -> tuple[PyTree, PyTree]:
        """`x` and the rest, with no derivative."""
        return stop_gradient(self.run(stop_gradient(self.inputs)))

    def residual(self, x: PyTree, inputs: PyTree) -> PyTree:
        """What is zero at `x`."""
        return self.rewrite_fn(x, None, inputs)


def algorithm_of(solver: Any) -> Any:
    """What makes the steps of a solver of ours, or of Optimistix' inside its own adapters."""
    solver = getattr(solver, "algorithm", solver)
    name = type(solver).__name__
    return getattr(solver, "solver", solver) if name in ("_MinimToRoot", "_LstsqToRoot") else solver
