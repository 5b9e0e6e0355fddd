"""Every outcome from a realistic cause, and a message that says what to do next."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import logistic, overparameterised, relative_error

ORACLE = logistic()


def outcome(problem, x0, theta, **choices):
    estimate, _ = bx.hypergradient(problem, x0, theta, throw=False, **choices)
    return estimate


def says(result, *words):
    message = bx.RESULTS[result]
    return all(word in message for word in words)


def test_inner_solve_not_converged():
    early = bx.Descent(optax.sgd(0.1), num_steps=5)
    estimate = outcome(ORACLE.problem, ORACLE.x0, ORACLE.theta, inner_solver=early)
    assert estimate.result == bx.RESULTS.inner_not_converged
    assert says(estimate.result, "more steps", "Implicit(inexact=True)", "Unrolled()")
    with pytest.raises(bx.SolveError, match="inner residual .*tolerance") as error:
        bx.hypergradient(ORACLE.problem, ORACLE.x0, ORACLE.theta, inner_solver=early)
    assert error.value.result == bx.RESULTS.inner_not_converged


def test_an_unrolled_hypergradient_of_an_early_stop_is_right_and_not_flagged():
    early = bx.Descent(optax.sgd(0.1), num_steps=5)
    estimate = outcome(
        ORACLE.problem, ORACLE.x0, ORACLE.theta, inner_solver=early, rule=bx.Unrolled()
    )
    assert estimate.result == bx.RESULTS.successful
    assert float(estimate.inner_residual) > 1e-3


def test_inexact_on_purpose_is_reported_and_not_flagged():
    estimate = outcome(
        ORACLE.problem,
        ORACLE.x0,
        ORACLE.theta,
        inner_solver=bx.Descent(optax.sgd(0.1), num_steps=5),
        rule=bx.Implicit(inexact=True),
    )
    assert estimate.result == bx.RESULTS.successful
    assert float(estimate.inner_residual) > float(estimate.inner_tolerance)


def test_a_solver_that_says_successful_is_not_believed():
    # Loose on the step, far from the solution of an ill-conditioned problem.
    scales = jnp.logspace(0, -4, 20)
    problem = bx.Bilevel(
        lambda x, t: 0.5 * jnp.sum(scales * (x - 1.0) ** 2) + 0.5 * jnp.exp(t) * jnp.sum(x**2),
        lambda x, t: jnp.sum(x**2),
    )

    def lazy(x0, theta):
        return optx.minimise(
            lambda x, t: problem.inner(x, t),
            optx.GradientDescent(0.1, rtol=1e-3, atol=1e-3),
            x0,
            args=theta,
            max_steps=10_000,
        ).value

    estimate = outcome(problem, jnp.zeros(20), jnp.asarray(-9.0), inner_solver=bx.Traceable(lazy))
    assert estimate.result == bx.RESULTS.inner_not_converged


def test_adjoint_solve_not_converged_and_fixed_number_of_steps():
    estimate = outcome(
        ORACLE.problem,
        ORACLE.x0,
        ORACLE.theta,
        rule=bx.Implicit(bx.linear.CG(rtol=1e-10, max_steps=2)),
    )
    assert estimate.result == bx.RESULTS.adjoint_not_converged
    assert says(estimate.result, "max_steps", "num_steps")
    fixed = outcome(
        ORACLE.problem, ORACLE.x0, ORACLE.theta, rule=bx.Implicit(bx.linear.CG(num_steps=2))
    )
    assert fixed.result == bx.RESULTS.successful
    assert float(fixed.adjoint_residual) > 1e-6
    assert int(fixed.stats["num_adjoint_steps"]) == 2


def test_negative_curvature():
    # x = 0 is a stationary point of the double well, and a maximum: the classic trap.
    problem = bx.Bilevel(
        lambda x, t: jnp.sum(x**4 / 4 - x**2 / 2) - t * jnp.sum(x) * 0.0,
        lambda x, t: jnp.sum((x - 1.0) ** 2) + t,
    )
    estimate = outcome(problem, jnp.zeros(2), jnp.asarray(1.0), inner_solver=bx.Given())
    assert estimate.result == bx.RESULTS.negative_curvature
    assert says(estimate.result, "not a strict minimum", "Unrolled()", "throw=False")
    assert says(estimate.result, "bx.Implicit(bx.linear.MINRES(indefinite=True))")


def test_one_element_of_a_batch_meets_negative_curvature():
    curvatures = jnp.ones(25).at[7].set(-1.0)

    def gradient(curvature, rule):
        problem = bx.Bilevel(
            lambda x, t: 0.5 * curvature * x**2 - t * x, lambda x, t: 0.5 * (x - 1.0) ** 2
        )
        estimate, _ = bx.hypergradient(
            problem, 0.5 / curvature, 0.5, inner_solver=bx.Given(), rule=rule, throw=False
        )
        return estimate.grad, estimate.result == bx.RESULTS.successful

    # x = t / c, so that the derivative is (t / c - 1) / c
    right = (0.5 / curvatures - 1) / curvatures
    for rule in (bx.Implicit(), bx.Implicit(bx.linear.CG(num_steps=2), inexact=True)):
        grads, is_right = jax.vmap(lambda c, rule=rule: gradient(c, rule))(curvatures)
        assert not is_right[7] and int(jnp.sum(is_right)) == 24
        np.testing.assert_allclose(jnp.where(is_right, grads, 0), jnp.where(is_right, right, 0))
    saddle = bx.Implicit(bx.linear.MINRES(indefinite=True))
    grads, is_right = jax.vmap(lambda c: gradient(c, saddle))(curvatures)
    assert bool(jnp.all(is_right))
    np.testing.assert_allclose(grads, right)


def test_singular_and_inconsistent():
    oracle = overparameterised()
    solver = bx.Descent(optax.sgd(0.1), num_steps=20_000)
    estimate = outcome(
        oracle.problem,
        oracle.x0,
        oracle.theta,
        inner_solver=solver,
        rule=bx.Implicit(bx.linear.CG()),
    )
    assert estimate.result != bx.RESULTS.successful
    assert estimate.result == bx.RESULTS.singular
    assert says(estimate.result, "many solutions", "bx.MinimumNorm()")
    # the remedy that the message names gives the minimum-norm response
    remedy = outcome(
        oracle.problem,
        oracle.x0,
        oracle.theta,
        inner_solver=solver,
        rule=bx.Implicit(lx.LSMR(rtol=1e-12, atol=1e-12)),
    )
    assert remedy.result == bx.RESULTS.successful
    assert relative_error(remedy.grad, oracle.hypergradient) < 1e-6


def test_nonfinite_from_bad_data_and_from_a_diverging_solver():
    data = (jnp.array([1.0, jnp.nan]), jnp.ones(2))
    problem = bx.Bilevel(
        lambda x, t, d: 0.5 * jnp.sum((x * d[0] - d[1]) ** 2) + jnp.exp(t) * x**2,
        lambda x, t: x**2,
        inner_data=data,
    )
    for solver, rule in (
        (None, bx.Implicit()),
        (bx.LBFGS(), bx.Implicit()),
        (bx.Descent(optax.sgd(0.1), num_steps=3), bx.Implicit(lx.CG(1e-6, 1e-6))),
    ):
        estimate = outcome(problem, 0.0, 0.0, inner_solver=solver, rule=rule)
        assert estimate.result == bx.RESULTS.nonfinite
        assert says(estimate.result, "NaN", "jax_debug_nans")
    diverging = bx.Descent(optax.sgd(1e4), num_steps=500)
    quartic = bx.Bilevel(lambda x, t: jnp.sum((x - t) ** 4), lambda x, t: jnp.sum(x**2))
    for rule in (bx.Implicit(), bx.Unrolled()):
        estimate = outcome(quartic, jnp.ones(2), 0.0, inner_solver=diverging, rule=rule)
        assert estimate.result == bx.RESULTS.nonfinite


def test_nonfinite_outer_objective():
    problem = bx.Bilevel(lambda x, t: 0.5 * (x - t) ** 2, lambda x, t: jnp.log(x))
    estimate = outcome(problem, 0.5, -1.0)
    assert estimate.result == bx.RESULTS.nonfinite


def test_precision_floor():
    # float32, condition number 1e6, and tolerances that only float64 can meet
    scales = jnp.logspace(0, -6, 30, dtype=jnp.float32)
    rotation = jnp.linalg.qr(jnp.cos(jnp.outer(jnp.arange(30.0), jnp.arange(30.0)) ** 1.1))[0]
    matrix = rotation @ (scales.astype(float)[:, None] * rotation.T)

    def problem(dtype):
        a = matrix.astype(dtype)
        return bx.Bilevel(
            lambda x, t, a: 0.5 * x @ (a @ x) - jnp.sum(x * t),
            lambda x, t: 0.5 * jnp.sum((x - 1) ** 2),
            inner_data=a,
        )

    def run(dtype):
        return outcome(
            problem(dtype),
            jnp.zeros(30, dtype),
            jnp.ones(30, dtype),
            inner_solver=bx.NewtonCG(rtol=1e-9, dense=False),
            rule=bx.Implicit(bx.linear.CG(rtol=1e-9)),
        )

    assert run(jnp.float32).result == bx.RESULTS.stalled
    assert says(run(jnp.float32).result, "float64", "rtol")
    assert run(jnp.float64).result == bx.RESULTS.successful


def test_errors_inside_somebody_elses_jit():
    @jax.jit
    def grad(theta):
        estimate, _ = bx.hypergradient(
            ORACLE.problem,
            ORACLE.x0,
            theta,
            inner_solver=bx.Descent(optax.sgd(0.1), num_steps=5),
        )
        return estimate.grad

    with pytest.raises(RuntimeError, match="inner solve did not converge"):
        jax.block_until_ready(grad(ORACLE.theta))


def test_argmin_fails_loudly_forwards_and_backwards_or_gives_nan():
    early = bx.Descent(optax.sgd(0.1), num_steps=5)
    x_star = bx.argmin(ORACLE.problem.inner, early)
    with pytest.raises(RuntimeError, match="inner solve did not converge"):
        jax.block_until_ready(x_star(ORACLE.x0, ORACLE.theta))
    quiet = bx.argmin(ORACLE.problem.inner, early, throw=False)
    assert bool(jnp.all(jnp.isnan(quiet(ORACLE.x0, ORACLE.theta))))
    rule = bx.Implicit(bx.linear.CG(rtol=1e-10, max_steps=1))

    def value(theta, throw):
        x_star = bx.argmin(ORACLE.problem.inner, bx.NewtonCG(), rule, throw=throw)
        return jnp.sum(x_star(ORACLE.x0, theta) ** 2)

    assert bool(jnp.isfinite(value(ORACLE.theta, True)))
    with pytest.raises(RuntimeError, match="adjoint system was not solved"):
        jax.block_until_ready(jax.grad(value)(ORACLE.theta, True))
    assert bool(jnp.all(jnp.isnan(jax.grad(value)(ORACLE.theta, False))))


def test_a_run_does_not_die_and_says_what_happened():
    # Where theta > 1 the inner problem is not convex; the first steps lead there.
    problem = bx.Bilevel(
        lambda x, t: 0.5 * (1.0 - t) * x**2 - x + 0.0 * x**4,
        lambda x, t: -x + 0.5 * t**2,
    )
    method = bx.DoubleLoop(optimizer=optax.sgd(1.0))
    with pytest.warns(RuntimeWarning, match="flagged outer evaluations"):
        solution = bx.solve(problem, 1.0, 0.5, method, num_steps=5)
    assert solution.stats["num_flagged"] > 0
    assert bool(jnp.isfinite(solution.theta))
    with pytest.raises(bx.SolveError):
        bx.solve(
            bx.Bilevel(lambda x, t: -0.5 * x**2 + x * t, lambda x, t: x**2),
            1.0,
            0.5,
            method,
            num_steps=30,
            throw=True,
        )


def test_a_run_gives_up_after_ten_failures():
    problem = bx.Bilevel(lambda x, t: jnp.log(-1.0 - x**2) + t * x, lambda x, t: x)
    with pytest.warns(RuntimeWarning, match="NaN"):
        solution = bx.solve(problem, 1.0, 0.5, num_steps=100)
    assert solution.stats["stopped_by"] == "failure"
    assert solution.stats["num_steps"] == 10
    assert solution.result == bx.RESULTS.nonfinite
    assert float(solution.theta) == 0.5


def test_more_inner_steps_are_the_first_remedy():
    # 12 steps do not reach the tolerance from afar, but three times 12 do.
    problem = bx.Bilevel(
        lambda x, t: 0.5 * jnp.sum((x - t) ** 2), lambda x, t: 0.5 * jnp.sum((x - 3.0) ** 2)
    )
    method = bx.DoubleLoop(
        bx.Descent(optax.sgd(0.5), num_steps=12, rtol=1e-8), optimizer=optax.sgd(0.1)
    )
    with pytest.warns(RuntimeWarning, match="inner_not_converged"):
        solution = bx.solve(problem, jnp.full(2, 100.0), jnp.ones(2), method, num_steps=150)
    assert solution.result == bx.RESULTS.successful
    assert solution.history.result[0] == "inner_not_converged"
    assert float(jnp.max(jnp.abs(solution.theta - 3.0))) < 0.1


def test_a_line_search_rejects_a_trial_that_is_not_finite():
    problem = bx.Bilevel(
        lambda x, t: 0.5 * (x - t) ** 2,
        lambda x, t: jnp.where(x < 10, 20 * (x - 1) ** 2, jnp.nan),
    )
    method = bx.DoubleLoop(optimizer=optx.BFGS(rtol=1e-8, atol=1e-8))
    with pytest.warns(RuntimeWarning, match="nonfinite"):  # the first trial is x = 40
        solution = bx.solve(problem, 0.0, 0.0, method, num_steps=30)
    assert solution.result == bx.RESULTS.successful
    assert float(solution.theta) == pytest.approx(1.0, rel=1e-4)


def test_errors_of_compiled_programs_end_with_the_sentence(caplog):
    x_star = bx.argmin(lambda x, theta: jnp.sum(x**4) / 4 - theta * x[0])
    early = bx.argmin(
        lambda x, theta: jnp.sum((x - theta) ** 2), bx.Descent(optax.sgd(1e-3), num_steps=2)
    )

    def map_of(fn):
        return lambda theta: fn(jnp.zeros(2), theta)

    # As itself where the error passes through this library; wrapped by JAX elsewhere.
    for call in (map_of(early), jax.vmap(map_of(early)), jax.jacrev(map_of(early))):
        with pytest.raises(bx.SolveError) as caught:
            call(jnp.ones(2))
        assert caught.value.result == bx.RESULTS.inner_not_converged
        assert caught.value.__suppress_context__
    for call in (jax.jacrev(map_of(x_star)), jax.jit(jax.jacrev(map_of(x_star)))):
        with pytest.raises(jax.errors.JaxRuntimeError) as wrapped:
            call(0.0)
        sentence = bx.RESULTS[bx.RESULTS.singular]
        assert str(wrapped.value).rstrip().endswith(f"SolveError: {sentence}")
    assert not caplog.records  # JAX would log the way through itself
