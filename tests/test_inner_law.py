"""Every inner solver, for every condition: successful exactly if the residual is small."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._inner._default import as_inner_solver

# Of each condition one that has a solution at SOLVABLE, (0.5, 1). At UNSOLVABLE the equations
# have none, but F'F has a minimum, where a minimiser stops.
SOLVABLE, UNSOLVABLE = jnp.array([0.5, -1.0]), jnp.array([0.5, 1.0])
START = jnp.array([0.4, 0.8])


def equation(x, theta):
    return jnp.stack([x[0] - theta[0], x[1] ** 2 + theta[1]])


CONDITIONS = {
    "Minimum": bx.Minimum(
        lambda x, theta: jnp.sum(jnp.array([1.0, 2.0]) * (x - jnp.abs(theta)) ** 2)
    ),
    "LeastSquares": bx.LeastSquares(lambda x, theta: (x - jnp.abs(theta), 0.1 * x)),
    "Root": bx.Root(equation),
    "FixedPoint": bx.FixedPoint(lambda x, theta: x - 0.4 * equation(x, theta)),
}
SOLVERS = {
    "default": None,
    "NewtonCG": bx.NewtonCG(),
    "NewtonCG products": bx.NewtonCG(dense=False),
    "LBFGS": bx.LBFGS(),
    "Optimistix(NewtonCG)": bx.Optimistix(bx.NewtonCG(), max_steps=50),
    "BFGS": optx.BFGS(1e-8, 1e-8),
    "NonlinearCG": optx.NonlinearCG(1e-8, 1e-8),
    "Newton": optx.Newton(1e-8, 1e-8),
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-8, 1e-8),
    "FixedPointIteration": optx.FixedPointIteration(1e-8, 1e-8),
    "Descent": bx.Descent(optax.sgd(0.3), num_steps=100, rtol=1e-8),
    "Given": bx.Given(),
    "Traceable": bx.Traceable(lambda x0, theta: jnp.abs(theta)),
}
# Their methods are for the others.
REFUSED = {("FixedPointIteration", c) for c in ("Minimum", "LeastSquares", "Root")}
REFUSED |= {("Descent", c) for c in ("Root", "FixedPoint")}
# The start, another problem's solution.
FLAGGED = {("Given", c) for c in CONDITIONS} | {("Traceable", "LeastSquares")}


@pytest.mark.parametrize("condition_name", CONDITIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_successful_exactly_if_the_residual_is_small(name, condition_name):
    condition = CONDITIONS[condition_name]
    solver = as_inner_solver(SOLVERS[name], condition, START)

    @eqx.filter_jit
    def solve(theta):
        state = solver.init(condition, START, theta)
        found = solver.solve(condition, START, theta, state)[0]
        return found, jnp.linalg.norm(condition.residual(found.x, theta))

    if (name, condition_name) in REFUSED:
        with pytest.raises(TypeError, match="solves fixed points|minimises a smooth objective"):
            solve(SOLVABLE)
        return
    is_equation = condition_name in ("Root", "FixedPoint")
    for theta in (SOLVABLE, UNSOLVABLE) if is_equation else (SOLVABLE,):
        found, residual = solve(theta)
        np.testing.assert_allclose(found.residual, residual, rtol=1e-6, atol=1e-14)
        is_successful = bool(found.result == bx.RESULTS.successful)
        assert is_successful == bool(found.residual <= found.tolerance)
        is_wanted = theta is SOLVABLE and (name, condition_name) not in FLAGGED
        assert is_successful == is_wanted
        if is_successful:
            np.testing.assert_allclose(residual, 0, atol=1e-5)
