"""The outer loop: right, warm-started, compiled once, talkative and hard to kill."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._outer._chunk import run_chunk
from bilevax.testing import nested, quadratic_game, relative_error, ridge


@pytest.fixture(scope="module")
def game():
    return quadratic_game()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.5),
        optx.BFGS(rtol=1e-9, atol=1e-9),
        optx.LBFGS(rtol=1e-9, atol=1e-9),
        optx.GradientDescent(0.5, rtol=1e-9, atol=1e-9),
        optx.NonlinearCG(rtol=1e-9, atol=1e-9),
        optx.OptaxMinimiser(optax.sgd(0.5), rtol=1e-9, atol=1e-9),
    ],
    ids=lambda o: type(o).__name__,
)
def test_outer_optimisers_reach_the_solution(game, optimizer):
    method = bx.DoubleLoop(
        bx.NewtonCG(rtol=1e-11), bx.Implicit(bx.linear.CG(rtol=1e-11)), optimizer
    )
    solution = bx.solve(game.problem, game.x0, game.theta, method, num_steps=300)
    assert solution.result == bx.RESULTS.successful
    assert relative_error(solution.theta, game.theta_star) < 1e-6
    # x, theta and value belong together
    x_of_theta, _ = bx.hypergradient(
        game.problem, game.x0, solution.theta, inner_solver=bx.NewtonCG(rtol=1e-11)
    )
    assert relative_error(solution.x, x_of_theta.x) < 1e-8
    assert float(solution.value) == pytest.approx(float(x_of_theta.value), rel=1e-9)


def test_outer_optimisers_that_cannot_work_say_so(game):
    for optimizer, message in (
        (optx.NelderMead(1e-6, 1e-6), "once a step"),
        (optax.lbfgs(), "Optimistix minimiser such as optx.BFGS"),
    ):
        with pytest.raises(TypeError, match=message):
            method = bx.DoubleLoop(optimizer=optimizer)
            bx.solve(game.problem, game.x0, game.theta, method, num_steps=2)


def test_history_agrees_with_hypergradient(game):
    method = bx.DoubleLoop(optimizer=optax.sgd(0.5))
    solution = bx.solve(game.problem, game.x0, game.theta, method, num_steps=5)
    theta = game.theta
    for k in range(6):
        estimate, _ = bx.hypergradient(game.problem, game.x0, theta)
        assert solution.history.value[k] == pytest.approx(float(estimate.value), rel=1e-8)
        norm = float(jnp.linalg.norm(estimate.grad))
        assert solution.history.hypergradient_norm[k] == pytest.approx(norm, rel=1e-5)
        theta = theta - 0.5 * estimate.grad
    assert len(solution.history) == 6
    assert solution.stats["num_steps"] == 5
    assert np.all(np.diff(solution.history.seconds) >= 0)
    columns = json.loads(json.dumps(solution.history.to_dict()))
    assert len(columns["result"]) == 6 and set(columns["result"]) == {"successful"}
    assert solution.stats["num_gradients"] == sum(columns["num_gradients"])
    assert "stopped by num_steps" in str(solution)


def test_history_is_drawn(game):
    solution = bx.solve(game.problem, game.x0, game.theta, num_steps=3)
    figure = solution.plot()
    assert len(figure.axes) == 3
    assert len(figure.axes[0].lines[0].get_xdata()) == 4
    unrolled = bx.DoubleLoop(bx.Descent(optax.sgd(0.2), num_steps=5), bx.Unrolled())
    bx.solve(game.problem, game.x0, game.theta, unrolled, num_steps=2).plot()


def test_second_call_compiles_nothing():
    first = ridge()
    before = run_chunk.num_compilations()

    def run(theta, learning_rate, scale):
        problem = bx.Bilevel(
            first.problem.inner.fn,
            first.problem.outer,
            jax.tree_util.tree_map(lambda a: a * scale, first.problem.inner_data),
            first.problem.outer_data,
        )
        method = bx.DoubleLoop(bx.NewtonCG(), optimizer=optax.adam(learning_rate))
        return bx.solve(problem, first.x0, theta, method, num_steps=7)

    run(first.theta, 0.1, 1.0)
    assert run_chunk.num_compilations() == before + 1
    # another start, another learning rate, other data, equal but new solver objects
    run(first.theta + 1.0, 0.05, 1.1)
    assert run_chunk.num_compilations() == before + 1


def test_a_run_traces_no_more_than_one_hypergradient():
    """Its functions are called as often as by that, and twice more for the check of their types."""

    def num_calls(run):
        calls = []

        def inner(x, theta):
            calls.append(x)
            return jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2)

        run(bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 0.4) ** 2)))
        return len(calls)

    x, theta = jnp.zeros(2), jnp.zeros(2)
    for_one = num_calls(lambda problem: bx.hypergradient(problem, x, theta))
    assert num_calls(lambda problem: bx.solve(problem, x, theta, num_steps=3)) <= for_one + 2


def test_tolerance_stops(game):
    method = bx.DoubleLoop(optimizer=optax.sgd(0.5))
    solution = bx.solve(
        game.problem, game.x0, game.theta, method, num_steps=500, rtol=1e-3, atol=0.0
    )
    norms = solution.history.hypergradient_norm
    assert solution.stats["stopped_by"] == "tolerance"
    assert solution.stats["num_steps"] < 100
    assert norms[-1] <= 1e-3 * norms[0] < norms[-3]


def test_callback_sees_matching_x_and_theta_and_stops(game):
    seen = []

    def callback(progress):
        seen.append(progress)
        return progress.num_steps >= 6

    method = bx.DoubleLoop(optimizer=optax.sgd(0.5))
    solution = bx.solve(game.problem, game.x0, game.theta, method, num_steps=50, callback=callback)
    assert solution.stats["stopped_by"] == "callback"
    assert [progress.num_steps for progress in seen] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(seen[0].theta, game.theta)
    for progress in seen:  # the arrays are the callback's own: later chunks left them alone
        estimate, _ = bx.hypergradient(game.problem, game.x0, progress.theta)
        np.testing.assert_allclose(progress.x, estimate.x, rtol=1e-6)
        assert progress.value == pytest.approx(float(estimate.value), rel=1e-8)
    seen.clear()
    bx.solve(
        game.problem,
        game.x0,
        game.theta,
        method,
        num_steps=10,
        callback=lambda p: seen.append(p),
        callback_every=4,
    )
    assert [progress.num_steps for progress in seen] == [4, 8]


def test_aux_of_the_outer_objective_comes_back(game):
    problem = bx.Bilevel(
        game.problem.inner, lambda x, t: (jnp.sum(x**2) + jnp.sum(t**2), {"x": x, "n": 3})
    )
    solution = bx.solve(problem, game.x0, game.theta, num_steps=2)
    np.testing.assert_allclose(solution.aux["x"], solution.x)


def test_interrupt_returns_the_solution_so_far(game):
    def callback(progress):
        if progress.num_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    solution = bx.solve(game.problem, game.x0, game.theta, num_steps=1000, callback=callback)
    assert solution.stats["stopped_by"] == "interrupt"
    assert 3 <= solution.stats["num_steps"] < 1000
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_outside_the_main_thread(game):
    out = []
    thread = threading.Thread(
        target=lambda: out.append(bx.solve(game.problem, game.x0, game.theta, num_steps=2))
    )
    thread.start()
    thread.join()
    assert out[0].stats["num_steps"] == 2


def test_progress_is_quiet_in_pipes_and_shown_on_request(game, capsys):
    bx.solve(game.problem, game.x0, game.theta, num_steps=3)
    assert capsys.readouterr().err == ""
    bx.solve(game.problem, game.x0, game.theta, num_steps=3, progress=True)
    assert "value=" in capsys.readouterr().err


def test_the_callers_arrays_are_left_alone(game):
    x0, theta = jnp.array(game.x0), jnp.array(game.theta)
    bx.solve(game.problem, x0, theta, num_steps=3)
    assert not x0.is_deleted() and not theta.is_deleted()
    np.testing.assert_array_equal(theta, game.theta)


def test_warm_starts_save_work_and_can_be_switched_off():
    oracle = ridge(num_samples=60, num_features=20)
    counts = {}
    for inner, adjoint in ((True, True), (False, True), (True, False), (False, False)):
        method = bx.DoubleLoop(
            bx.NewtonCG(rtol=1e-3, dense=False),
            bx.Implicit(bx.linear.CG(rtol=1e-3)),
            optax.adam(0.05),
            start="warm" if inner else "cold",
            warm_start_adjoint=adjoint,
        )
        solution = bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=20)
        counts[inner, adjoint] = solution.stats["num_hessian_products"]
    assert counts[True, True] < counts[False, True] < counts[False, False]
    assert counts[True, True] < counts[True, False] < counts[False, False]


def test_start_that_depends_on_theta_is_not_warm_started_when_unrolled():
    problem = bx.Bilevel(lambda x, t: 0.5 * jnp.sum(x**2), lambda x, t: 0.5 * jnp.sum((x - 1) ** 2))
    method = bx.DoubleLoop(bx.Descent(optax.sgd(0.1), num_steps=3), bx.Unrolled(), optax.sgd(0.5))
    # x_3 = 0.9^3 theta: the best theta is 0.9^-3
    solution = bx.solve(problem, lambda theta: theta, jnp.zeros(2), method, num_steps=100)
    np.testing.assert_allclose(solution.theta, 0.9**-3 * np.ones(2), rtol=1e-6)


def test_optimiser_state_can_be_carried_between_outer_steps(game):
    def run(carry_state):
        descent = bx.Descent(optax.adam(0.05), num_steps=3, carry_state=carry_state)
        method = bx.DoubleLoop(descent, bx.Implicit(inexact=True), optax.sgd(0.1))
        return bx.solve(game.problem, game.x0, game.theta, method, num_steps=4)

    carried, fresh = run(True), run(False)
    # 4 solves of 3 carried Adam steps are 12 consecutive ones, for a theta that stands still
    frozen = bx.DoubleLoop(
        bx.Descent(optax.adam(0.05), num_steps=3, carry_state=True),
        bx.Implicit(inexact=True),
        optax.sgd(0.0),
    )
    x = bx.solve(game.problem, game.x0, game.theta, frozen, num_steps=3).x
    state = optax.adam(0.05).init(game.x0)
    y = game.x0
    for _ in range(12):
        gradient = game.problem.inner.residual(y, game.theta)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes floats and integers
            updates, state = optax.adam(0.05).update(gradient, state)
        y = optax.apply_updates(y, updates)
    np.testing.assert_allclose(x, y, rtol=1e-12)
    assert relative_error(carried.x, fresh.x) > 1e-6


def test_external_solver_in_the_loop(game):
    calls = []

    def newton(x0, theta, data):
        calls.append(type(x0))
        matrix = jax.hessian(lambda x: game.problem.inner(x, jnp.asarray(theta)))(jnp.asarray(x0))
        gradient = game.problem.inner.residual(jnp.asarray(x0), jnp.asarray(theta))
        return np.asarray(x0) - np.linalg.solve(np.asarray(matrix), np.asarray(gradient))

    for optimizer in (optax.sgd(0.5), optx.BFGS(1e-8, 1e-8)):
        method = bx.DoubleLoop(bx.External(newton), optimizer=optimizer)
        solution = bx.solve(game.problem, game.x0, game.theta, method, num_steps=80)
        assert solution.result == bx.RESULTS.successful
        assert relative_error(solution.theta, game.theta_star) < 1e-5
    assert set(calls) == {np.ndarray}


def test_nested_pytrees_run(tmp_path):
    oracle = nested()
    solution = bx.solve(
        oracle.problem,
        oracle.x0,
        oracle.theta,
        bx.DoubleLoop(optimizer=optax.sgd(0.1)),
        num_steps=400,
    )
    assert relative_error(solution.theta, oracle.theta_star) < 1e-3


def test_many_entries_of_theta_and_few_outer_examples_are_remarked_on():
    problem = bx.Bilevel(
        lambda x, theta: jnp.sum(jnp.exp(theta) * x**2 + (x - 1) ** 2),
        lambda x, theta, data: jnp.mean((data - jnp.sum(x)) ** 2),
        outer_data=jnp.arange(40.0),
    )
    for size, is_said in ((2, False), (5, True)):
        solution = bx.solve(problem, jnp.zeros(size), jnp.zeros(size), num_steps=1)
        assert solution.stats["num_outer_rows"] == 40
        assert (f"{size} entries of theta were fitted to 40 outer" in str(solution)) == is_said
