"""The inner solver that a user's choice, or none, stands for."""

from typing import Any

import optax
import optimistix as optx
from jaxtyping import PyTree

from .._problem import AbstractCondition
from .._problem._constrained import MOST_DENSE
from .._tree import default_rtol, tree_size
from ._base import AbstractInnerSolver
from ._damped_newton import DampedNewton
from ._external import Given
from ._interior_point import InteriorPoint
from ._measured import AbstractMeasuredMinimiser
from ._newton_cg import NewtonCG
from ._optimistix import Optimistix
from ._proximal_newton import ProximalNewton
from ._quadratic import Clarabel

# By then Newton's method has arrived, also at a double root, or wanders; and as many shortened
# steps, each of which may be halved a few times.
_FULL_STEPS = 100


def _for_equation(condition: AbstractCondition, x0: PyTree) -> Optimistix:
    # A tenth: these stop on the step, and the residual is what we judge by; in the scale of
    # the solution, whatever it is, so without `atol`.
    rtol = default_rtol(x0)
    is_fixed_point = condition.iteration is not None
    first = (optx.FixedPointIteration if is_fixed_point else optx.Newton)(0.1 * rtol, 0.1 * rtol)
    # `optx.Newton` has taken the full steps already.
    second = DampedNewton(0.1 * rtol, 0.0, full_steps=_FULL_STEPS if is_fixed_point else 0)
    fallback = Optimistix(second, max_steps=4 * _FULL_STEPS, rtol=rtol, atol=0.0)
    return Optimistix(first, rtol=rtol, atol=0.0, fallback=fallback)


def _usual(condition: AbstractCondition, x0: PyTree) -> Any:
    if condition.nonsmooth is not None:
        return ProximalNewton()
    if condition.has_inequalities:
        return InteriorPoint() if tree_size(x0) <= MOST_DENSE else Clarabel()
    return NewtonCG() if condition.objective is not None else _for_equation(condition, x0)


def as_inner_solver(solver: Any, condition: AbstractCondition, x0: PyTree) -> AbstractInnerSolver:
    """`solver` as an `AbstractInnerSolver`; `None` is the default for the condition.

    `NewtonCG` for minima, Newton's method for roots, fixed-point iteration for fixed
    points; where these two give up, Newton's method, at last with steps that are shortened.
    """
    if solver is None:
        solver = condition.default_solver(x0)
    if solver is None:
        solver = _usual(condition, x0)
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
