"""Optimistix' solvers as inner solvers: their tolerances, their options, their precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import bilevax as bx


def outer(x, theta):
    return jnp.sum((x - 0.5) ** 2)


def test_a_tolerance_of_the_largest_entry_is_not_one_of_the_two_norm():
    # Each entry's residual is just below the tolerance, their two-norm is not.
    size = 400
    scale = jnp.linspace(1.0, 2.0, size)
    condition = bx.FixedPoint(
        lambda x, theta: x - 0.3 * scale * (x - theta) * (1 + (x - theta) ** 2)
    )
    solver = optx.FixedPointIteration(rtol=0.0, atol=1e-6)
    estimate, _ = bx.hypergradient(
        bx.Bilevel(condition, outer), jnp.zeros(size), jnp.ones(()), inner_solver=solver
    )
    np.testing.assert_allclose(estimate.grad, size, rtol=1e-4)
    assert 1e-6 < estimate.inner_tolerance <= 1e-6 * size**0.5 * 1.001


def cube(x, theta):
    return x**3 + x - theta


@pytest.mark.parametrize("theta", [1.0, 1.5])
def test_bounds_of_bisection(theta):
    solver = bx.Optimistix(
        optx.Bisection(rtol=1e-10, atol=1e-10), options={"lower": 0.0, "upper": 2.0}, rtol=1e-8
    )
    problem = bx.Bilevel(bx.Root(cube), lambda x, theta: x**2)
    x0, theta = jnp.array(0.5), jnp.array(theta)
    estimate, _ = bx.hypergradient(problem, x0, theta, inner_solver=solver)
    x = estimate.x
    np.testing.assert_allclose(cube(x, theta), 0, atol=1e-9)
    np.testing.assert_allclose(estimate.grad, 2 * x / (3 * x**2 + 1), rtol=1e-8)
    x_star = bx.argmin(bx.Root(cube), inner_solver=solver)
    slope = jax.grad(lambda t: x_star(x0, t) ** 2)(theta)
    np.testing.assert_allclose(slope, estimate.grad, rtol=1e-8)


def test_options_that_are_words():
    solver = bx.Optimistix(optx.LevenbergMarquardt(1e-9, 1e-9), options={"jac": "bwd"})
    condition = bx.LeastSquares(lambda x, theta: (x - theta, 0.5 * x))
    estimate, _ = bx.hypergradient(
        bx.Bilevel(condition, outer), jnp.zeros(3), jnp.ones(3), inner_solver=solver
    )
    np.testing.assert_allclose(estimate.grad, 2 * (0.8 - 0.5) * 0.8 * jnp.ones(3), rtol=1e-6)


TARGET = jnp.array([1.0, 2.0, 3.0])
AUX = {
    "Minimum": lambda x, t: (0.5 * jnp.sum((x - t * TARGET) ** 2), {"norm": jnp.sum(x)}),
    "Root": lambda x, t: (x - t * TARGET, jnp.sum(x)),
    "FixedPoint": lambda x, t: (0.5 * (x + t * TARGET), "a word"),
    "LeastSquares": lambda x, t: (x - t * TARGET, jnp.sum(x)),
}


@pytest.mark.parametrize("name", AUX)
def test_inner_functions_with_auxiliary_output(name):
    condition = getattr(bx, name)(AUX[name], has_aux=True)
    theta = jnp.array(1.5)
    exact = jnp.sum(2 * (theta * TARGET - 0.5) * TARGET)
    estimate, _ = bx.hypergradient(bx.Bilevel(condition, outer), jnp.zeros(3), theta)
    np.testing.assert_allclose(estimate.grad, exact, rtol=1e-5)
    x_star = bx.argmin(condition)
    slope = jax.grad(lambda t: outer(x_star(jnp.zeros(3), t), t))(theta)
    np.testing.assert_allclose(slope, exact, rtol=1e-5)


def test_an_x_that_is_a_pair_is_not_a_value_with_auxiliary_output():
    condition = bx.Root(lambda x, theta: (x[0] - theta, x[1] - 2 * theta))
    problem = bx.Bilevel(condition, lambda x, theta: x[0] * x[1])
    x0 = (jnp.array(0.0), jnp.array(0.0))
    estimate, _ = bx.hypergradient(problem, x0, jnp.array(3.0))
    np.testing.assert_allclose(estimate.grad, 12.0, rtol=1e-5)


def gradient(x, theta):
    """Of `||x - TARGET||^2 / 2 + exp(theta) ||x||^2 / 2`, computed in float64."""
    x, theta = x.astype(float), theta.astype(float)
    return x - TARGET + jnp.exp(theta) * x


def energy(x, theta):
    x, theta = x.astype(float), theta.astype(float)
    return 0.5 * jnp.sum((x - TARGET) ** 2 + jnp.exp(theta) * x**2)


def residuals(x, theta):
    x, theta = x.astype(float), theta.astype(float)
    return x - TARGET, jnp.exp(theta / 2) * x


DOUBLE = {
    "NewtonCG": (bx.NewtonCG(), energy),
    "LBFGS": (bx.LBFGS(), energy),
    "BFGS": (optx.BFGS(1e-5, 1e-5), energy),
    "NelderMead": (bx.Optimistix(optx.NelderMead(1e-6, 1e-6), rtol=1e-2), energy),
    "root": (None, bx.Root(gradient)),
    "fixed point": (None, bx.FixedPoint(lambda x, t: x.astype(float) - 0.4 * gradient(x, t))),
    "least squares": (optx.LevenbergMarquardt(1e-5, 1e-5), bx.LeastSquares(residuals)),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in DOUBLE), ("root", "bfloat16")]
)
def test_functions_that_compute_in_another_precision(name, dtype):
    solver, condition = DOUBLE[name]
    x0, theta = jnp.zeros(3, dtype), jnp.zeros((), dtype)
    estimate, _ = bx.hypergradient(
        bx.Bilevel(condition, outer), x0, theta, inner_solver=solver, throw=dtype == "float32"
    )
    assert estimate.x.dtype == estimate.grad.dtype == x0.dtype
    exact = np.sum(2 * (TARGET / 2 - 0.5) * -TARGET / 4)
    rtol = 2e-3 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(float(estimate.grad), exact, rtol=rtol)
