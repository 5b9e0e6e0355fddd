"""Steps whose derivative does not converge with x: flagged where x has converged."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import quadratic, relative_error

NOISE = np.random.default_rng(0).normal(size=(3, 10, 40))
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def window(x):
    """Ten steps of a chaotic model of 40 variables (Lorenz 1996)."""

    def slope(x):
        return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8.0

    def step(x, _):
        half = x + 0.025 * slope(x)
        new = x + 0.05 * slope(half)
        return new, new

    return jax.lax.scan(step, x, None, length=10)[1]


TRUTH = window(window(window(jnp.asarray(8.0 + NOISE[0, 0]))[-1])[-1])[-1]
DATA = {
    "background": TRUTH + 0.5 * NOISE[1, 0],
    "observed": window(TRUTH)[:, ::2] + 0.3 * NOISE[2, :, ::2],
}


def assimilation(x, theta, data):
    """Weak background, strong observations: a condition number of some hundreds."""
    background = jnp.exp(theta[0]) * jnp.sum((x - data["background"]) ** 2)
    return 0.5 * background + 0.5 * jnp.exp(theta[1]) * jnp.sum(
        (window(x)[:, ::2] - data["observed"]) ** 2
    )


WINDOW = bx.Bilevel(assimilation, lambda x, theta: jnp.mean((x - TRUTH) ** 2), inner_data=DATA)
THETA = jnp.array([0.0, 3.0])


def on_window(solver, rule, x0=DATA["background"]):
    return bx.hypergradient(WINDOW, x0, THETA, inner_solver=solver, rule=rule, throw=False)[0]


@pytest.fixture(scope="module")
def exact():
    found = on_window(bx.LBFGS(rtol=1e-8), bx.Implicit())
    assert bool(found.result == bx.RESULTS.successful)
    return found.grad


def test_lbfgs_steps_up_to_a_converged_window_are_flagged(exact):
    found = on_window(bx.LBFGS(rtol=1e-8), bx.Unrolled())
    assert relative_error(found.grad, exact) > 0.1
    assert bool(found.result != bx.RESULTS.successful)
    assert not bool(found.is_bilevel)


ORACLE = quadratic(condition=50.0)
EXACT = ORACLE.hypergradient


def on_quadratic(solver, rule):
    return bx.hypergradient(
        ORACLE.problem, ORACLE.x0, ORACLE.theta, inner_solver=solver, rule=rule, throw=False
    )[0]


WRONG = {
    # How far its adjoint grows is chance.
    "nonlinear cg": (optx.NonlinearCG(1e-10, 1e-10), bx.Unrolled(max_growth=math.inf)),
    "nonlinear cg, forwards": (optx.NonlinearCG(1e-10, 1e-10), bx.ForwardMode()),
}
RIGHT = {
    "bfgs": (optx.BFGS(**TIGHT), bx.Unrolled()),
    "newton": (bx.NewtonCG(), bx.Unrolled()),
    "gradient descent": (bx.Descent(optax.sgd(0.03), 2_000), bx.Unrolled()),
    "momentum, backwards": (
        bx.Descent(optax.sgd(0.03, momentum=0.8), 1_000),
        bx.Unrolled(checkpoints="reversible"),
    ),
    "forwards": (bx.Descent(optax.sgd(0.03, momentum=0.8), 1_000), bx.ForwardMode()),
    "the last steps": (bx.Descent(optax.sgd(0.03), 2_000), bx.Truncated(900)),
    "as many as matter": (bx.Descent(optax.sgd(0.03), 2_000), bx.Truncated("auto")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_derivatives_of_steps_are_flagged(name):
    found = on_quadratic(*WRONG[name])
    assert float(found.inner_residual) < 1e-5
    assert relative_error(found.grad, EXACT) > 1
    assert bool(found.result == bx.RESULTS.path_dependent)
    assert not bool(found.is_bilevel)
    error = np.linalg.norm(found.grad - EXACT)
    assert float(found.error_estimate) == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_are_not_and_say_what_they_are(name):
    found = on_quadratic(*RIGHT[name])
    assert relative_error(found.grad, EXACT) < 1e-2
    assert bool(found.result == bx.RESULTS.successful)
    assert bool(found.is_bilevel)


def test_far_from_converged_it_is_the_derivative_of_the_steps():
    found = on_quadratic(bx.Descent(optax.sgd(0.03), 5), bx.Unrolled())
    assert relative_error(found.grad, EXACT) > 0.1
    assert bool(found.result == bx.RESULTS.successful)
    assert not bool(found.is_bilevel)


def test_what_theta_changes_of_the_steps_alone_is_no_disagreement():
    # the step size and the start do not move the solution
    problem = bx.Bilevel(
        lambda x, theta: 0.5 * jnp.sum((x - theta["shift"]) ** 2),
        lambda x, theta: jnp.sum((x - 2.0) ** 2),
    )
    theta = {"shift": jnp.ones(3), "rate": jnp.asarray(0.5), "start": jnp.zeros(3)}
    found, _ = bx.hypergradient(
        problem,
        lambda theta: theta["start"],
        theta,
        inner_solver=bx.Descent(lambda theta: optax.sgd(theta["rate"]), 30),
        rule=bx.Unrolled(),
    )
    np.testing.assert_allclose(found.grad["shift"], -2.0 * np.ones(3), rtol=1e-6)
    assert bool(found.is_bilevel)
    assert 0 < float(jnp.abs(found.grad["rate"])) < 1e-6


@pytest.mark.parametrize("name", ["newton", "gradient descent"])
def test_a_factor_of_the_objective_does_not_move_its_minimum(name):
    """Nor is what rounding makes of that a disagreement."""
    solver = RIGHT[name][0]
    inner, x0, theta = ORACLE.problem.inner, ORACLE.x0, ORACLE.theta
    problem = bx.Bilevel(
        lambda x, factor: jnp.exp(factor) * inner(x, theta),
        lambda x, factor: jnp.sum((x - 0.3) ** 2),
    )
    found, _ = bx.hypergradient(
        problem, x0, jnp.asarray(0.2), inner_solver=solver, rule=bx.Unrolled()
    )
    assert abs(float(found.grad)) < 1e-6
    assert bool(found.is_bilevel)

    def value(factor):
        x_star = bx.argmin(problem.inner, solver, rule=bx.Unrolled())
        return jnp.sum(x_star(x0, factor) ** 2)

    assert abs(float(jax.jit(jax.grad(value))(jnp.asarray(0.2)))) < 1e-6


def test_a_root_by_steps():
    matrix = jnp.array([[2.0, 1.0], [-1.0, 3.0]])
    problem = bx.Bilevel(
        bx.Root(lambda x, theta: matrix @ x - theta), lambda x, theta: jnp.sum(x**2)
    )
    theta = jnp.array([1.0, 2.0])
    found, _ = bx.hypergradient(
        problem, jnp.zeros(2), theta, inner_solver=optx.Newton(**TIGHT), rule=bx.Unrolled()
    )
    assert bool(found.is_bilevel)
    x = np.linalg.solve(matrix, theta)
    np.testing.assert_allclose(found.grad, 2 * np.linalg.solve(matrix.T, x), rtol=1e-9)


def test_other_rules_do_not_say():
    assert on_quadratic(bx.NewtonCG(), bx.Implicit()).is_bilevel is None


# Inside other programs nothing is reported: there a derivative that is not that of x fails.


def shifted(x, theta):
    return 0.5 * jnp.sum((x - theta) ** 2)


SOLUTION = jnp.array([1.0, 2.0, 3.0])


def through_argmin(solver, rule, inner=shifted, throw=True):
    x_star = bx.argmin(inner, solver, rule=rule, throw=throw)
    return lambda theta: x_star(SOLUTION, theta)


def through_optimistix(solver, rule, inner=shifted):
    def x_star(theta):
        return optx.minimise(
            inner, solver, SOLUTION, theta, adjoint=rule, max_steps=100, throw=False
        ).value

    return x_star


@pytest.mark.parametrize("attach", [through_argmin, through_optimistix])
def test_no_step_from_the_solution_has_no_derivative_of_zero(attach):
    unrolled, forwards = attach(bx.LBFGS(), bx.Unrolled()), attach(bx.LBFGS(), bx.ForwardMode())
    gradient = jax.jit(jax.grad(lambda theta: jnp.sum(unrolled(theta))))  # one program
    with pytest.raises(Exception, match="its derivative through the steps has not"):
        jax.block_until_ready(gradient(SOLUTION))
    with pytest.raises(Exception, match="its derivative through the steps has not"):
        jax.block_until_ready(jax.jvp(forwards, (SOLUTION,), (SOLUTION,))[1])
    # ... and from elsewhere it is right
    found = gradient(2 * SOLUTION)
    np.testing.assert_allclose(found, np.ones(3), rtol=1e-6)


def test_of_a_batch_only_the_element_is_lost():
    """Problems that share theta, each with data of its own; the first starts at its solution."""
    data = jnp.stack([SOLUTION, 2 * SOLUTION])

    def x_star(theta, element):
        inner = bx.Minimum(lambda x, theta, data: shifted(x, theta * data), element)
        solver = optx.GradientDescent(0.5, **TIGHT)
        return bx.argmin(inner, solver, rule=bx.Unrolled(), throw=False)(SOLUTION, theta)

    def total(theta, weights):
        solutions = jax.vmap(lambda element: x_star(theta, element))(data)
        return jnp.sum(weights[:, None] * solutions)

    gradients = jax.vmap(jax.grad(lambda theta, d: jnp.sum(x_star(theta, d))), (None, 0))
    found = jax.jit(gradients)(jnp.ones(3), data)
    assert np.all(np.isnan(found[0]))
    np.testing.assert_allclose(found[1], 2 * SOLUTION, rtol=1e-6)
    # A failed element that nothing asks for has no part in the derivative of the others.
    summed = jax.jit(jax.grad(total))(jnp.ones(3), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(summed, 2 * SOLUTION, rtol=1e-6)


@pytest.mark.parametrize("attach", [through_argmin, through_optimistix])
def test_a_derivative_that_is_lost_on_the_way_raises(attach):
    def no_slope_in_theta(x, theta):
        return shifted(x, 2 * SOLUTION) + jnp.sum(x) * jnp.sqrt(0 * jnp.sum(theta))

    solver = bx.Descent(optax.sgd(0.5), 3) if attach is through_argmin else bx.LBFGS()
    x_star = attach(solver, bx.Unrolled(), no_slope_in_theta)
    with pytest.raises(Exception, match="NaN or an infinity appeared"):
        jax.block_until_ready(jax.grad(lambda theta: jnp.sum(x_star(theta)))(SOLUTION))


def test_wrong_derivatives_of_steps_fail_in_the_solution_map():
    inner, x0, theta = ORACLE.problem.inner, ORACLE.x0, ORACLE.theta

    def value(theta, rule):
        x = bx.argmin(inner, optx.NonlinearCG(1e-10, 1e-10), rule=rule)(x0, theta)
        return ORACLE.problem.outer_value(x, theta)[0]

    gradient = jax.jit(jax.grad(value), static_argnums=1)
    with pytest.raises(Exception, match="its derivative through the steps has not"):
        jax.block_until_ready(gradient(theta, bx.Unrolled()))
    np.testing.assert_allclose(gradient(theta, bx.Implicit()), EXACT, rtol=1e-4)


def test_what_is_right_has_derivatives_of_every_order():
    def value(theta):
        x_star = bx.argmin(
            lambda x, theta: jnp.sum((x["a"] - jnp.sin(theta)) ** 2) + jnp.sum(x["b"] ** 2),
            bx.Descent(optax.sgd(0.25), 40),
            rule=bx.Unrolled(checkpoints="all"),
        )
        start = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
        return jnp.sum(x_star(start, theta)["a"] ** 2)

    expected = 2 * np.diag(np.cos(2 * SOLUTION))
    np.testing.assert_allclose(jax.jit(jax.hessian(value))(SOLUTION), expected, atol=1e-6)


def test_searches_within_the_steps_are_refused_by_name():
    solver = bx.Descent(optax.lbfgs(), num_steps=5)
    with pytest.raises(TypeError, match="a loop of unknown length"):
        jax.grad(lambda theta: jnp.sum(through_argmin(solver, bx.Truncated("auto"))(theta)))(
            2 * SOLUTION
        )
