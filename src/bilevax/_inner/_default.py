"""The inner solver that a user's choice, or none, stands for."""

from typing import Any

import optax
import optimistix as optx
from jaxtyping import PyTree

from .._problem import AbstractCondition, FixedPoint, Root
from .._tree import default_rtol, tree_size
from ._base import AbstractInnerSolver
from ._external import Given
from ._measured import AbstractMeasuredMinimiser
from ._newton_cg import NewtonCG
from ._optimistix import Optimistix


def as_inner_solver(solver: Any, condition: AbstractCondition, x0: PyTree) -> AbstractInnerSolver:
    """`solver` as an `AbstractInnerSolver`; `None` is the default for the condition.

    `NewtonCG` for minima, Newton's method for roots, fixed-point iteration for fixed
    points.
    """
    if solver is None:
        # A tenth: these two stop on the step, and the residual is what we judge by.
        tolerance = 0.1 * default_rtol(x0)
        if isinstance(condition, Root):
            solver = optx.Newton(rtol=tolerance, atol=tolerance)
        elif isinstance(condition, FixedPoint):
            solver = optx.FixedPointIteration(rtol=tolerance, atol=tolerance)
        else:
            solver = NewtonCG()
    if isinstance(solver, AbstractMeasuredMinimiser) and tree_size(x0) == 0:
        return Given()  # no inner variables: nothing to solve for
    if isinstance(solver, AbstractInnerSolver):
        return solver
    if isinstance(solver, optx.AbstractIterativeSolver):
        return Optimistix(solver)
    if isinstance(solver, optax.GradientTransformation):
        raise TypeError(
            "An Optax optimiser does not say how many steps to take: write "
            "bx.Descent(optimizer, num_steps=...)."
        )
    if callable(solver):
        raise TypeError(
            "A function as inner solver must say where it runs: bx.Traceable(fn) if JAX can "
            "trace it, bx.External(fn) if it runs on the host (SciPy, scikit-learn, ...)."
        )
    raise TypeError(
        "`inner_solver` must be an Optimistix solver, bx.NewtonCG(), bx.LBFGS(), "
        "bx.Descent(...), bx.External(fn), bx.Traceable(fn) or bx.Given(); got "
        f"{type(solver).__name__}."
    )
