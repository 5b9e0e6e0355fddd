"""x, v and theta move together: SOBA on all data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import extend, testing
from bilevax._outer._chunk import run_chunk

ORACLE = testing.quadratic_game()
PROBLEM, X0, THETA0 = ORACLE.problem, ORACLE.x0, ORACLE.theta
FAST = optax.sgd(0.2)


def solve(method, problem=PROBLEM, x0=X0, **keywords):
    keywords = {"num_steps": 1000, "progress": False, **keywords}
    return bx.solve(problem, x0, THETA0, method, **keywords)


def test_directions_vanish_at_the_solution_and_are_derivatives_elsewhere():
    answer = ORACLE.reference(THETA0)
    down = extend.directions(PROBLEM, answer.x_star, answer.v_star, THETA0)
    assert max(np.abs(down.x).max(), np.abs(down.v).max()) < 1e-14
    np.testing.assert_allclose(down.theta, answer.hypergradient, rtol=1e-13)
    x, v, theta = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.7]), jnp.array([1.0, -0.4, 0.2])
    down = extend.directions(PROBLEM, x, v, theta)
    gradient = jax.grad(PROBLEM.inner)

    def lagrangian(x, theta):
        return PROBLEM.outer_value(x, theta)[0] - v @ gradient(x, theta)

    in_x, in_theta = jax.grad(lagrangian, (0, 1))(x, theta)
    np.testing.assert_allclose(down.x, gradient(x, theta), rtol=1e-14)
    np.testing.assert_allclose(down.v, -in_x, rtol=1e-13)
    np.testing.assert_allclose(down.theta, in_theta, rtol=1e-13)


@pytest.mark.parametrize("step", [0.05, 0.2, 1.0])
def test_it_reaches_the_optimum(step):
    method = bx.SingleLoop(optax.sgd(step), inner_optimizer=FAST, evaluate_every=100)
    solution = solve(method, num_steps=3000)
    np.testing.assert_allclose(solution.theta, ORACLE.theta_star, atol=1e-8)
    np.testing.assert_allclose(solution.x, ORACLE.reference(solution.theta).x_star, rtol=1e-8)
    assert solution.result is bx.RESULTS.successful
    assert solution.history.hypergradient_norm[-1] < 1e-8


def test_steps_are_those_of_the_paper_whatever_is_evaluated_between():
    theta, x, v = THETA0, X0, jnp.zeros_like(X0)
    for _ in range(10):
        down = extend.directions(PROBLEM, x, v, theta)
        x, v, theta = x - 0.2 * down.x, v - 0.1 * down.v, theta - 0.05 * down.theta
    for every in (1, 4, 20):
        method = bx.SingleLoop(
            optax.sgd(0.05),
            inner_optimizer=FAST,
            adjoint_optimizer=optax.sgd(0.1),
            evaluate_every=every,
        )
        solution = solve(method, num_steps=10)
        np.testing.assert_allclose(solution.theta, theta, rtol=1e-12)
        assert list(solution.history.step) == [*range(0, 10, every), 10]
        assert solution.stats["num_steps"] == 10
        assert solution.stats["num_cross_products"] == 10 + len(solution.history)
        # what is reported is true of theta, and not of the x and v on the way
        expected = ORACLE.reference(theta)
        np.testing.assert_allclose(solution.value, expected.value, rtol=1e-9)
        norm = np.linalg.norm(expected.hypergradient)
        np.testing.assert_allclose(solution.history.hypergradient_norm[-1], norm, rtol=1e-6)


def test_callbacks_tolerances_and_a_second_run():
    method = bx.SingleLoop(optax.sgd(0.3, momentum=0.5), inner_optimizer=FAST, evaluate_every=7)
    calls = []
    solution = solve(method, rtol=1e-3, callback=calls.append, callback_every=10)
    assert solution.stats["stopped_by"] == "tolerance"
    assert {call.num_steps % 7 for call in calls} == {0}
    assert min(np.diff([call.num_steps for call in calls])) >= 10
    before = run_chunk.num_compilations()
    again = solve(method, rtol=1e-3)
    assert run_chunk.num_compilations() == before
    np.testing.assert_array_equal(again.theta, solution.theta)
    assert "SingleLoop(" in repr(method)


def test_a_fixed_point_and_what_is_refused():
    contraction = bx.FixedPoint(lambda x, theta: 0.5 * jnp.sin(x) + theta[0])
    problem = bx.Bilevel(contraction, lambda x, theta: jnp.sum((x - 1.0) ** 2))
    method = bx.SingleLoop(optax.sgd(0.1), inner_optimizer=optax.sgd(1.0), evaluate_every=50)
    solution = solve(method, problem, jnp.zeros(1))
    np.testing.assert_allclose(solution.theta[0], 1.0 - 0.5 * np.sin(1.0), atol=1e-8)
    with pytest.raises(TypeError, match="Root has neither"):
        solve(method, bx.Bilevel(bx.Root(lambda x, theta: x - theta[0]), problem.outer), X0)
    with pytest.raises(TypeError, match="inner_optimizer=...\\) must be an Optax"):
        bx.SingleLoop(optax.sgd(0.1), inner_optimizer=0.1)
    with pytest.raises(ValueError, match="evaluate_every"):
        bx.SingleLoop(optax.sgd(0.1), inner_optimizer=FAST, evaluate_every=0)


def test_a_run_that_diverges_says_so_and_returns_the_best():
    method = bx.SingleLoop(optax.sgd(20.0), inner_optimizer=FAST, evaluate_every=50)
    with pytest.warns(RuntimeWarning, match="reduce step sizes"):
        solution = solve(method)
    assert solution.result is bx.RESULTS.nonfinite
    assert solution.stats["stopped_by"] == "failure" and solution.stats["num_steps"] < 1000
    np.testing.assert_array_equal(solution.theta, THETA0)
