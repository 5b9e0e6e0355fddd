"""The default solver of equations goes on by Newton's method before it gives up."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import bilevax as bx


def supply(quantity, theta):
    """The best responses of Cournot's firms: their map is expansive from the fourth firm on."""
    return 0.5 * (10.0 - theta - (jnp.sum(quantity) - quantity))


def market(num_firms):
    return bx.Bilevel(bx.FixedPoint(supply), lambda x, theta: jnp.sum(x**2)), jnp.zeros(num_firms)


@pytest.mark.parametrize("num_firms", [2, 3, 6])
def test_a_market_of_firms(num_firms):
    # x = (10 - theta) / (n + 1), L = n x^2.
    problem, x0 = market(num_firms)
    estimate, _ = bx.hypergradient(problem, x0, jnp.asarray(1.0))
    x = 9 / (num_firms + 1)
    np.testing.assert_allclose(estimate.x, jnp.full(num_firms, x), rtol=1e-5)
    np.testing.assert_allclose(estimate.grad, -2 * num_firms * x / (num_firms + 1), rtol=1e-5)


def test_one_market_of_a_batch():
    problem, x0 = market(6)
    thetas = jnp.asarray([1.0, 4.0, 7.0])
    x_star = bx.argmin(problem.inner)
    x = jax.vmap(lambda theta: x_star(x0, theta))(thetas)
    np.testing.assert_allclose(x, jnp.outer((10 - thetas) / 7, jnp.ones(6)), rtol=1e-5)
    slope = jax.vmap(jax.grad(lambda theta: x_star(x0, theta)[0]))(thetas)
    np.testing.assert_allclose(slope, jnp.full(3, -1 / 7), rtol=1e-5)


MATRIX = np.random.default_rng(0).normal(size=(8, 8))
PROBLEMS = {
    # condition, x0, theta, the right x
    "expansive": (bx.FixedPoint(lambda x, t: jnp.asarray(MATRIX) @ x + t), jnp.zeros(8), 1.0,
                  np.linalg.solve(np.eye(8) - MATRIX, np.ones(8))),
    "cycle": (bx.FixedPoint(lambda x, t: t - x), jnp.zeros(3), 2.0, np.ones(3)),
    "slow": (bx.FixedPoint(lambda x, t: 0.9999 * x + t), jnp.zeros(3), 1.0, np.full(3, 1e4)),
    "large units": (bx.FixedPoint(lambda x, t: 1e8 * t - 3 * x), jnp.zeros(2), 4.0, [1e8, 1e8]),
    "small units": (bx.FixedPoint(lambda x, t: 1e-8 * t - 3 * x), jnp.zeros(2), 4.0, [1e-8, 1e-8]),
    "overshoot": (bx.Root(lambda x, t: jnp.arctan(x - t)), jnp.asarray([10.0, -3.0]), 1.0, [1, 1]),
    "logarithm": (bx.Root(lambda x, t: jnp.log(x) - t), jnp.asarray(10.0), 1.0, np.e),
    "dictionary": (bx.Root(lambda x, t: {"a": x["a"] ** 3 - t, "b": x["b"] - x["a"]}),
                   {"a": jnp.asarray(0.1), "b": jnp.zeros(2)}, 8.0, {"a": 2.0, "b": [2.0, 2.0]}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_well_posed_equations_are_solved(name):
    condition, x0, theta, right = PROBLEMS[name]
    x = bx.argmin(condition)(x0, jnp.asarray(theta))
    right = right if isinstance(right, dict) else {"x": right}
    for key, found in (x if isinstance(x, dict) else {"x": x}).items():
        np.testing.assert_allclose(found, right[key], rtol=1e-4)


@pytest.mark.parametrize("kind", [bx.Root, bx.FixedPoint])
def test_an_equation_without_a_root_is_flagged(kind):
    def nothing(x, theta):
        value = x**2 + theta
        return value if kind is bx.Root else x - value

    problem = bx.Bilevel(kind(nothing), lambda x, theta: jnp.sum(x))
    estimate, _ = bx.hypergradient(problem, jnp.asarray([0.5, 2.0]), jnp.asarray(1.0), throw=False)
    assert estimate.result != bx.RESULTS.successful
    assert bool(jnp.all(jnp.isfinite(estimate.x)))


def test_a_solver_that_was_named_is_the_only_one():
    problem, x0 = market(6)
    solver = optx.FixedPointIteration(1e-7, 1e-7)
    estimate, _ = bx.hypergradient(problem, x0, jnp.asarray(1.0), inner_solver=solver, throw=False)
    assert estimate.result != bx.RESULTS.successful
    both = bx.Optimistix(solver, fallback=optx.Newton(1e-9, 1e-9))
    estimate, _ = bx.hypergradient(problem, x0, jnp.asarray(1.0), inner_solver=both)
    np.testing.assert_allclose(estimate.x, jnp.full(6, 9 / 7), rtol=1e-8)


def test_an_outer_loop_over_a_market():
    # The tax t of n firms with x = (10 - t)/(n + 1) that earns most, t n x, is 5.
    problem = bx.Bilevel(bx.FixedPoint(supply), lambda x, theta: -theta * jnp.sum(x))
    solution = bx.solve(problem, jnp.zeros(6), jnp.asarray(1.0), num_steps=60)
    np.testing.assert_allclose(solution.value, -5 * 6 * 5 / 7, rtol=1e-4)
