"""Outer L-BFGS and Newton: right, tolerant of noise, and not to be lured onto a flat tail."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax.testing import (
    logistic,
    quadratic_game,
    relative_error,
    ridge_log_lambda,
    scalar_game,
)

OPTIMISERS = [bx.OuterLBFGS(), bx.OuterNewton()]
by_name = pytest.mark.parametrize("optimizer", OPTIMISERS, ids=lambda o: type(o).__name__)


def run(oracle, theta, optimizer, rtol, num_steps=40, **options):
    rtol = jnp.asarray(rtol)  # an array: another number compiles nothing
    rule = bx.Implicit(bx.linear.CG(rtol=rtol), **options)
    method = bx.DoubleLoop(bx.NewtonCG(rtol=rtol), rule, optimizer)
    return bx.solve(oracle.problem, oracle.x0, theta, method, num_steps=num_steps)


@by_name
def test_games_are_solved_to_rounding(optimizer):
    for oracle in (scalar_game(), quadratic_game()):
        solution = run(oracle, oracle.theta, optimizer, 1e-11)
        assert solution.stats["stopped_by"] == "optimizer"
        assert relative_error(solution.theta, oracle.theta_star) < 1e-7
        # the value was as far from the optimum as the model said, and then it was there
        history = solution.history
        assert history.predicted_decrease[-1] < 1e-14
        if isinstance(optimizer, bx.OuterNewton) and oracle.name == "quadratic_game":
            assert solution.stats["num_steps"] <= 4
            gap = history.value - float(oracle.reference(oracle.theta_star).value)
            np.testing.assert_allclose(history.predicted_decrease[:2], gap[:2], rtol=1e-6)
            # digits of the digest
            assert float(solution.value) == pytest.approx(-1.0811081024349287, rel=1e-12)


@by_name
def test_ridge_from_both_flat_ends(optimizer):
    oracle = ridge_log_lambda()
    for start in (-6.0, 5.0):
        solution = run(oracle, jnp.asarray(start), optimizer, 1e-10)
        assert solution.result == bx.RESULTS.successful
        assert float(solution.theta) == pytest.approx(0.2030269090, abs=1e-6)
        assert float(solution.value) == pytest.approx(1.3363560857, abs=1e-10)


@by_name
@pytest.mark.parametrize("error_estimate", [True, False])
def test_noisy_hypergradients_get_as_far_as_their_noise(optimizer, error_estimate):
    oracle = logistic()
    best = float(run(oracle, oracle.theta, optimizer, 1e-10).value)
    options = {"error_estimate": error_estimate}
    noisy = run(oracle, oracle.theta, optimizer, 1e-2, **options)
    assert noisy.stats["num_flagged"] == 0
    exact, _ = bx.hypergradient(oracle.problem, oracle.x0, noisy.theta)
    first = noisy.history.value[0] - best
    assert float(exact.value) - best < 1e-3 * first


def test_pairs_within_the_noise_are_left_out():
    # the same hypergradients, once exact, once with an error larger than their changes
    optimizer = bx.OuterLBFGS()
    game = quadratic_game()
    estimate, _ = bx.hypergradient(game.problem, game.x0, game.theta)
    rng = np.random.default_rng(0)

    def told(value, grad, error):
        value, error = jnp.asarray(value), jnp.asarray(error)
        return dataclasses.replace(
            estimate, grad=jnp.asarray(grad), value=value, dual_value=value, error_estimate=error
        )

    for error, learns in ((10.0, False), (0.0, True)):
        theta, state = jnp.zeros(3), optimizer.init(jnp.zeros(3))
        for k in range(6):
            point = optimizer.next_point(theta, state)
            grad = 0.1 * np.asarray(point) + 1e-3 * rng.normal(size=3)
            theta, state, _, _ = optimizer.update(theta, state, told(-1.0 * k, grad, error), None)
        assert bool(state.is_empty) is not learns


def flat_tail(theta0, optimizer, num_steps):
    """`x* = theta`, `L = 1/sqrt(1 + theta^2)`: the optimum is at infinity."""
    problem = bx.Bilevel(
        lambda x, t: 0.5 * jnp.sum((x - t) ** 2), lambda x, t: jnp.sum(1 / jnp.sqrt(1 + x**2))
    )
    method = bx.DoubleLoop(bx.NewtonCG(rtol=1e-10), optimizer=optimizer)
    return bx.solve(problem, jnp.zeros(1), jnp.full(1, theta0), method, num_steps=num_steps)


@by_name
def test_a_flat_tail_is_visible_in_the_predicted_decrease(optimizer):
    solution = flat_tail(20.0, optimizer, 20)
    history = solution.history
    theta, value = float(solution.theta[0]), float(solution.value)
    assert 20.0 < theta <= 40.0 + 1e-9  # at most max_step a step
    # the gradient is tiny; what is left is not, and the history says so within a factor
    assert history.hypergradient_norm[-1] < 2e-3
    assert 0.05 * value < history.predicted_decrease[-1] < value


@by_name
def test_an_optimum_at_infinity_is_not_jumped_at(optimizer):
    # useless features: the best strength is infinite
    rng = np.random.default_rng(0)
    A, y = rng.normal(size=(30, 2)), rng.normal(size=30)
    problem = bx.Bilevel(
        lambda x, t: 0.5 * jnp.sum((A @ x - y) ** 2) + 0.5 * jnp.sum(jnp.exp(t) * x**2),
        lambda x, t: 0.5 * jnp.sum(x**2),
    )
    seen = [np.zeros(2)]
    method = bx.DoubleLoop(bx.NewtonCG(rtol=1e-10), optimizer=optimizer)
    solution = bx.solve(
        problem,
        jnp.zeros(2),
        jnp.zeros(2),
        method,
        num_steps=15,
        callback=lambda p: seen.append(np.asarray(p.theta)),
    )
    assert np.max(np.abs(np.diff(seen, axis=0))) <= 1 + 1e-9
    assert np.all(np.diff(solution.history.value[:-1]) < 0)  # the last is evaluated again
    assert np.min(solution.theta) > 3 and solution.history.value[-1] < 1e-3 * float(
        solution.history.value[0]
    )


def test_float32_runs():
    oracle = quadratic_game(jnp.float32)
    for optimizer in OPTIMISERS:
        solution = bx.solve(
            oracle.problem,
            oracle.x0,
            oracle.theta,
            bx.DoubleLoop(optimizer=optimizer),
            num_steps=20,
        )
        assert solution.theta.dtype == jnp.float32
        assert relative_error(solution.theta, oracle.theta_star) < 1e-3


def test_mistakes_are_refused():
    oracle = quadratic_game()
    with pytest.raises(TypeError, match="has 3 entries; max_variables is 2"):
        method = bx.DoubleLoop(optimizer=bx.OuterNewton(max_variables=2))
        bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=1)
    with pytest.raises(TypeError, match="implicit rule"):
        bx.DoubleLoop(hypergradient=bx.Unrolled(), optimizer=bx.OuterNewton())
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="max_step"):
            bx.OuterLBFGS(max_step=bad)
    with pytest.raises(ValueError, match="memory"):
        bx.OuterLBFGS(memory=0)
