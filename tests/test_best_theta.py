"""A run gives back the best theta it has seen, and says where it ended."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx


def inner(x, theta):
    return 0.5 * jnp.sum((x - theta) ** 2)


def outer(x, theta):
    return 0.5 * jnp.sum(x**2), {"x": x, "theta": theta}


PROBLEM = bx.Bilevel(inner, outer)
X0, THETA0 = jnp.ones(2), jnp.array([0.5, -1.0])
# theta is multiplied by 0.5, and from the fourth step on by -3
FALLS_THEN_RISES = optax.sgd(lambda k: jnp.where(k < 3, 0.5, 4.0))
RISES = optax.sgd(2.5)


def belongs_together(solution):
    np.testing.assert_allclose(solution.x, solution.theta, rtol=1e-6)
    np.testing.assert_allclose(solution.aux["x"], solution.x)
    np.testing.assert_allclose(solution.aux["theta"], solution.theta)
    np.testing.assert_allclose(solution.value, 0.5 * jnp.sum(solution.x**2), rtol=1e-12)


@pytest.mark.parametrize(
    "solver", [None, bx.External(lambda x, theta: theta)], ids=["compiled", "on the host"]
)
def test_the_best_theta_is_given_back(solver):
    method = bx.DoubleLoop(solver, optimizer=FALLS_THEN_RISES)
    with pytest.warns(RuntimeWarning, match="The run ended above its start"):
        solution = bx.solve(PROBLEM, X0, THETA0, method, num_steps=70)  # more than one chunk
    np.testing.assert_allclose(solution.theta, THETA0 / 8, rtol=1e-6)
    belongs_together(solution)
    assert solution.result == bx.RESULTS.not_improved
    history = solution.history
    assert len(history) == 71  # of the whole run, as ever
    assert solution.best.step == 3
    assert solution.stats["last_value"] == history.value[-1] > history.value[0]
    assert float(solution.value) == history.value[3] == np.min(history.value)
    assert "that of outer step 3, value 0.00976562, and it is returned" in str(solution)


@pytest.mark.parametrize(
    "solver", [None, bx.External(lambda x, theta: theta)], ids=["compiled", "on the host"]
)
def test_a_run_that_ends_below_its_start_ends_at_its_last_theta(solver):
    method = bx.DoubleLoop(solver, optimizer=FALLS_THEN_RISES)
    solution = bx.solve(PROBLEM, X0, THETA0, method, num_steps=4)
    np.testing.assert_allclose(solution.theta, -3 * THETA0 / 8, rtol=1e-6)
    belongs_together(solution)
    assert solution.result == bx.RESULTS.successful
    np.testing.assert_allclose(solution.best.theta, THETA0 / 8, rtol=1e-6)
    np.testing.assert_allclose(solution.best.x, THETA0 / 8, rtol=1e-6)
    assert float(solution.best.value) == solution.history.value[3]
    assert "step 3, value 0.00976562, and it is in `solution.best`; the last" in str(solution)


def test_the_last_theta_is_given_back_where_it_is_as_good():
    method = bx.DoubleLoop(optimizer=optax.sgd(0.5))
    solution = bx.solve(PROBLEM, X0, THETA0, method, num_steps=8)
    np.testing.assert_allclose(solution.theta, THETA0 / 2**8, rtol=1e-6)
    assert solution.best.step == 8
    np.testing.assert_array_equal(solution.best.theta, solution.theta)
    assert solution.stats["last_value"] == float(solution.value)
    assert "best theta" not in str(solution)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=lambda d: d.__name__)
def test_a_run_that_only_climbs_says_so(dtype):
    method = bx.DoubleLoop(optimizer=RISES)
    x0, theta0 = X0.astype(dtype), THETA0.astype(dtype)
    with pytest.warns(RuntimeWarning, match="The run ended above its start"):
        solution = bx.solve(PROBLEM, x0, theta0, method, num_steps=5)
    assert solution.result == bx.RESULTS.not_improved
    assert solution.best.step == 0
    np.testing.assert_array_equal(solution.theta, theta0)
    belongs_together(solution)
    with pytest.raises(bx.SolveError, match="Take smaller steps"):
        bx.solve(PROBLEM, x0, theta0, method, num_steps=5, throw=True)


def test_fixed_steps_from_a_fixed_start_are_compared():
    descent = bx.Descent(optax.sgd(0.5), num_steps=3)
    method = bx.DoubleLoop(descent, bx.Unrolled(), FALLS_THEN_RISES, start="cold")
    with pytest.warns(RuntimeWarning, match="The run ended above its start"):
        solution = bx.solve(PROBLEM, X0, THETA0, method, num_steps=12)
    best = int(np.argmin(solution.history.value))
    assert 0 < best == solution.best.step < 12
    assert float(solution.best.value) == solution.history.value[best]


def test_steps_that_depend_on_the_past_do_not_judge_theta():
    # x wanders from 0 to theta in steps that are too few: the value rises, theta stands still
    few = bx.Descent(optax.sgd(0.1), num_steps=1)
    method = bx.DoubleLoop(few, bx.Implicit(inexact=True), optax.sgd(0.0))
    with pytest.warns(RuntimeWarning, match="inexact=True"):
        solution = bx.solve(PROBLEM, jnp.zeros(2), THETA0, method, num_steps=20)
    np.testing.assert_allclose(solution.x, (1 - 0.9**21) * THETA0, rtol=1e-6)
    assert solution.result == bx.RESULTS.not_improved
    assert solution.best.step == 20
    # chance: a value that rises by it means nothing
    rule = bx.EvolutionStrategies(jax.random.key(0), num_pairs=2)
    method = bx.DoubleLoop(few, rule, optax.sgd(0.0))
    solution = bx.solve(PROBLEM, jnp.zeros(2), THETA0, method, num_steps=20)
    assert solution.result == bx.RESULTS.successful


def test_values_within_their_errors_are_equal():
    # a loose inner solve: the first values are low only because x is not there yet
    matrix = jnp.diag(jnp.logspace(0, -3, 6))
    problem = bx.Bilevel(
        lambda x, t: 0.5 * x @ matrix @ x - jnp.exp(t) @ x,
        lambda x, t: 0.5 * jnp.sum((matrix @ x - 1) ** 2),
    )
    method = bx.DoubleLoop(bx.NewtonCG(rtol=1e-1, dense=False), optimizer=optax.sgd(1e-6))
    solution = bx.solve(problem, jnp.zeros(6), jnp.zeros(6), method, num_steps=5)
    assert solution.best.step == 5


def test_other_methods_and_failures():
    solution = bx.solve(PROBLEM, X0, THETA0, bx.MAID(), num_steps=10)
    belongs_together(solution)
    assert float(solution.value) <= np.min(solution.history.value) + 1e-12
    # beyond |theta| = 1 there is no inner solution: the run gives up and is flagged, its theta good
    walled = bx.Bilevel(
        lambda x, t: jnp.sum(jnp.where(jnp.abs(t) < 1, 0.5 * (x - t) ** 2, jnp.nan)),
        lambda x, t: jnp.sum((x - 3) ** 2),
    )
    for optimizer in (optax.sgd(10.0), optx.GradientDescent(10.0, 1e-8, 1e-8)):
        method = bx.DoubleLoop(optimizer=optimizer)
        with pytest.warns(RuntimeWarning, match="NaN or an infinity"):
            solution = bx.solve(walled, jnp.zeros(1), jnp.zeros(1), method, num_steps=30)
        assert solution.result != bx.RESULTS.successful
        assert np.isfinite(solution.value) and np.all(np.abs(solution.theta) < 1)
        np.testing.assert_allclose(solution.x, solution.theta, atol=1e-6)


@pytest.mark.parametrize(
    ("kinked", "start", "optimizer"),
    [(lambda x: jnp.maximum(0.0, x), 0.7, optax.adam(0.1)), (jnp.abs, -0.4, bx.OuterLBFGS())],
    ids=["max", "abs"],
)
def test_theta_does_not_move_on_a_kink(kinked, start, optimizer):
    # x* = 0 wherever |theta| is small: the value does not depend on theta
    problem = bx.Bilevel(
        lambda x, t: jnp.sum(0.5 * (x - t) ** 2 + kinked(x)), lambda x, t: jnp.sum((x - 1.0) ** 2)
    )
    theta0 = jnp.array([start])
    method = bx.DoubleLoop(optimizer=optimizer)
    with pytest.warns(RuntimeWarning, match="not smooth at x"):
        solution = bx.solve(problem, jnp.zeros(1), theta0, method, num_steps=12)
    np.testing.assert_array_equal(solution.theta, theta0)
    assert solution.result == bx.RESULTS.not_smooth
    assert solution.stats["stopped_by"] == "failure"


def test_a_failed_run_says_why():
    problem = bx.Bilevel(lambda x, t: jnp.sum(t * x), lambda x, t: jnp.sum(x**2))
    with pytest.warns(RuntimeWarning, match="there is no minimum"):
        solution = bx.solve(problem, jnp.zeros(1), jnp.ones(1), num_steps=12)
    assert solution.result == bx.RESULTS.unbounded
