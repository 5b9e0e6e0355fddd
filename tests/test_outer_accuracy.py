"""Schedules of tolerances, and MAID: the same answer for fewer products, without tuning."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._outer._chunk import run_chunk
from bilevax.testing import (
    logistic,
    overparameterised,
    quadratic_game,
    relative_error,
    ridge_log_lambda,
)

BEST = {  # of OuterNewton with tolerances 1e-10; the first two agree with the digest
    "ridge_log_lambda": 1.3363560856648,
    "quadratic_game": -1.0811081024349,
    "logistic": 0.6938055198987,
}


def calls(solution):
    stats = solution.stats
    return stats["num_gradients"] + stats["num_hessian_products"] + stats["num_cross_products"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (bx.ExponentialTolerance(0.1, rate=0.5, floor=0.02), [0.1, 0.05, 0.025, 0.02]),
        (bx.PolynomialTolerance(0.1, power=2, floor=0.01), [0.1, 0.025, 0.1 / 9, 0.01]),
        (bx.PolynomialTolerance(0.1, power=3), [0.1, 0.0125, 0.1 / 27, 0.1 / 64]),
    ],
)
def test_schedules_are_what_they_say(schedule, expected):
    for k, value in enumerate(expected):
        pair = schedule.tolerances(jnp.asarray(k, jnp.int32), jnp.zeros(2))
        np.testing.assert_allclose(pair, [value, value], rtol=1e-12)
    last = schedule.tolerances(jnp.asarray(10**6, jnp.int32), jnp.zeros(2, jnp.float32))
    assert last[0].dtype == jnp.float32 and float(last[0]) >= 0.999e-4


def test_schedules_reach_the_same_optimum_with_fewer_calls():
    oracle = logistic(num_features=20)
    found = {}
    for name, tolerances in (
        ("tight", bx.ExponentialTolerance(1e-6, floor=1e-6)),
        ("exponential", bx.ExponentialTolerance(floor=1e-6)),
        ("cubic", bx.PolynomialTolerance(power=3, floor=1e-6)),
    ):
        method = bx.DoubleLoop(
            bx.NewtonCG(dense=False),
            bx.Implicit(bx.linear.CG()),
            optax.sgd(2.0),
            tolerances=tolerances,
        )
        found[name] = bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=60)
        assert found[name].stats["num_flagged"] == 0
    for name, part in (("exponential", 0.7), ("cubic", 0.95)):
        assert relative_error(found[name].theta, found["tight"].theta) < 1e-2
        assert calls(found[name]) < part * calls(found["tight"])


def test_a_new_schedule_compiles_nothing():
    oracle = quadratic_game()

    def run(tolerances):
        method = bx.DoubleLoop(optimizer=optax.sgd(0.1), tolerances=tolerances)
        return bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=3)

    run(bx.ExponentialTolerance(jnp.asarray(0.1), floor=jnp.asarray(1e-3)))
    before = run_chunk.num_compilations()
    run(bx.ExponentialTolerance(jnp.asarray(0.2), floor=jnp.asarray(1e-4)))
    assert run_chunk.num_compilations() == before


def test_tolerances_that_cannot_be_chosen_are_refused():
    oracle = quadratic_game()
    schedule = bx.ExponentialTolerance()
    for method, message in (
        (bx.DoubleLoop(bx.Given(), tolerances=schedule), "Given"),
        (
            bx.DoubleLoop(bx.Descent(optax.sgd(0.1), num_steps=3), tolerances=schedule),
            "fixed number",
        ),
        (bx.DoubleLoop(hypergradient=bx.OneStep(), tolerances=schedule), "bx.Implicit"),
        (bx.DoubleLoop(hypergradient=bx.Accurate(0.1), tolerances=schedule), "itself"),
        (bx.MAID(bx.Given()), "Given"),
        (bx.MAID(certified=True), "strong_convexity"),
    ):
        with pytest.raises(TypeError, match=message):
            bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=1)
    for make, message in (
        (lambda: bx.ExponentialTolerance(rate=1.0), "rate"),
        (lambda: bx.PolynomialTolerance(power=1), "power"),
        (lambda: bx.ExponentialTolerance(-1.0), "initial"),
        (lambda: bx.MAID(step_size=0.0), "step_size"),
        (lambda: bx.MAID(tolerance=-1.0), "tolerance"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="ExponentialTolerance"):
        bx.DoubleLoop(tolerances=1e-3)
    with pytest.raises(TypeError, match="Unrolled"):
        bx.MAID(hypergradient=bx.Unrolled())


@pytest.mark.parametrize("build", [ridge_log_lambda, quadratic_game, logistic])
def test_maid_needs_no_tuning(build):
    oracle = build()
    starts = [oracle.theta]
    if build is ridge_log_lambda:
        starts = [jnp.asarray(-6.0), jnp.asarray(5.0)]
    for theta in starts:
        for step_size in (1e-3, 1.0, 1e3):
            for tolerance in (1e-1, 1e-5):
                # arrays: another number compiles nothing
                method = bx.MAID(
                    bx.NewtonCG(dense=False),
                    bx.Implicit(bx.linear.CG()),
                    step_size=jnp.asarray(step_size),
                    tolerance=jnp.asarray(tolerance),
                )
                solution = bx.solve(oracle.problem, oracle.x0, theta, method, num_steps=60)
                assert solution.stats["num_flagged"] == 0
                exact, _ = bx.hypergradient(oracle.problem, oracle.x0, solution.theta)
                assert float(exact.value) - BEST[oracle.name] < 1e-7
                history = solution.history
                # an error of at most half the hypergradient, at every step that was made
                wanted = 0.5 * history.hypergradient_norm[:-1]
                assert np.all(history.error_estimate[:-1] <= wanted * (1 + 1e-9))


def test_maid_gets_more_accurate_as_it_converges():
    oracle = logistic()
    method = bx.MAID(bx.NewtonCG(dense=False), bx.Implicit(bx.linear.CG()))
    solution = bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=30)
    history = solution.history
    assert history.error_estimate[-2] < 1e-3 * history.error_estimate[0]
    # the record belongs together
    exact, _ = bx.hypergradient(oracle.problem, oracle.x0, oracle.theta)
    assert history.value[0] == pytest.approx(float(exact.value), rel=1e-2)
    assert history.value[0] != pytest.approx(float(exact.value), rel=1e-9)
    x_of_theta, _ = bx.hypergradient(oracle.problem, oracle.x0, solution.theta)
    assert relative_error(solution.x, x_of_theta.x) < 1e-5
    assert float(solution.value) == pytest.approx(float(x_of_theta.value), rel=1e-8)


def test_certified_maid_uses_the_bound():
    fn = logistic().problem.inner
    oracle = logistic()
    inner = bx.Minimum(fn.fn, fn.data, strong_convexity=lambda t: jnp.min(jnp.exp(t)))
    problem = bx.Bilevel(inner, oracle.problem.outer, outer_data=oracle.problem.outer_data)
    solution = bx.solve(problem, oracle.x0, oracle.theta, bx.MAID(certified=True), num_steps=8)
    history = solution.history
    assert solution.stats["num_flagged"] == 0
    assert np.all(history.error_estimate <= 0.5 * history.hypergradient_norm)
    assert float(solution.value) - BEST["logistic"] < 0.1 * (history.value[0] - BEST["logistic"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_maid_flags_what_it_cannot_do():
    # a singular adjoint system: no hypergradient, theta stays, and the run ends with the reason
    oracle = overparameterised()
    method = bx.MAID(bx.NewtonCG(), bx.Implicit(bx.linear.CG()))
    solution = bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=20)
    assert solution.result != bx.RESULTS.successful
    # trials outside the domain are rejected, and the run goes on
    problem = bx.Bilevel(
        lambda x, t: 0.5 * (x - t) ** 2, lambda x, t: x - 0.1 * jnp.log(x), None, None
    )
    method = bx.MAID(step_size=1e3, max_step=100.0)
    solution = bx.solve(problem, jnp.asarray(1.0), jnp.asarray(1.0), method, num_steps=30)
    assert float(solution.theta) == pytest.approx(0.1, abs=1e-4)
    assert solution.stats["num_flagged"] == 0


def test_maid_in_float32_on_a_pytree_with_callbacks():
    oracle = quadratic_game(jnp.float32)
    problem = bx.Bilevel(
        lambda x, t, data: oracle.problem.inner.fn(x["x"], t["t"], data),
        lambda x, t, data: (oracle.problem.outer(x["x"], t["t"], data), {"n": jnp.sum(x["x"])}),
        oracle.problem.inner_data,
        oracle.problem.outer_data,
    )
    seen = []
    solution = bx.solve(
        problem,
        {"x": oracle.x0},
        {"t": oracle.theta},
        bx.MAID(),
        num_steps=20,
        callback=lambda p: seen.append(p),
    )
    assert relative_error(solution.theta["t"], oracle.theta_star) < 1e-2
    assert solution.theta["t"].dtype == jnp.float32
    np.testing.assert_allclose(solution.aux["n"], jnp.sum(solution.x["x"]), rtol=1e-5)
    for progress in seen:  # x, theta and value belong together
        reference = oracle.reference(np.asarray(progress.theta["t"], np.float64))
        assert relative_error(progress.x["x"], reference.x_star) < 0.5
        np.testing.assert_allclose(progress.aux["n"], jnp.sum(progress.x["x"]), rtol=1e-4)
