"""Unrolled derivatives against plain autodiff of a Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._loop._scan import repeat
from bilevax.testing import learned_step_size, logistic, relative_error

# Others in `test_every_optimiser.py`: the derivative of a loop is that of its steps.
OPTIMISERS = {
    "momentum": optax.sgd(0.2, momentum=0.8),
    "adam": optax.adam(0.05, eps_root=1e-12),
    "chain": optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.add_decayed_weights(1e-2),
        optax.trace(0.5),
        optax.scale_by_schedule(optax.exponential_decay(-0.2, 3, 0.8)),
    ),
}
ORACLE = logistic()


def reference(optimiser, num_steps, theta, detach_before=0):
    """A Python loop, differentiated by JAX as it stands."""

    def value(theta):
        x = ORACLE.x0 + 0.1 * jnp.sum(theta)
        state = optimiser.init(x)
        for k in range(num_steps):
            if k == detach_before and k > 0:
                x, state = jax.lax.stop_gradient((x, state))
            updates, state = optimiser.update(ORACLE.problem.inner.residual(x, theta), state, x)
            x = optax.apply_updates(x, updates)
        return ORACLE.problem.outer_value(x, theta)[0]

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes floats and integer counts
        return jax.grad(value)(theta)


def start(theta):
    return ORACLE.x0 + 0.1 * jnp.sum(theta)


@pytest.mark.parametrize(("name", "num_steps"), [("momentum", 2), ("adam", 7), ("chain", 7)])
def test_unrolled_equals_a_python_loop(name, num_steps):
    optimiser = OPTIMISERS[name]
    expected = reference(optimiser, num_steps, ORACLE.theta)
    estimate, _ = bx.hypergradient(
        ORACLE.problem,
        start,
        ORACLE.theta,
        inner_solver=bx.Descent(optimiser, num_steps=num_steps),
        rule=bx.Unrolled(),
    )
    assert relative_error(estimate.grad, expected) < 1e-12


# The ends. "sqrt" is above; "all", 3 and a budget are in `test_every_optimiser.py`.
@pytest.mark.parametrize("checkpoints", [1, 100])
def test_every_memory_policy_gives_the_same_derivative(checkpoints):
    estimate, _ = bx.hypergradient(
        ORACLE.problem,
        start,
        ORACLE.theta,
        inner_solver=bx.Descent(OPTIMISERS["adam"], num_steps=23),
        rule=bx.Unrolled(checkpoints=checkpoints),
    )
    assert relative_error(estimate.grad, reference(OPTIMISERS["adam"], 23, ORACLE.theta)) < 1e-12


def test_truncated_differentiates_the_last_steps():
    estimate, _ = bx.hypergradient(
        ORACLE.problem,
        start,
        ORACLE.theta,
        inner_solver=bx.Descent(OPTIMISERS["momentum"], num_steps=9),
        rule=bx.Truncated(num_steps=4),
    )
    expected = reference(OPTIMISERS["momentum"], 9, ORACLE.theta, detach_before=5)
    assert relative_error(estimate.grad, expected) < 1e-12
    whole, _ = bx.hypergradient(
        ORACLE.problem,
        start,
        ORACLE.theta,
        inner_solver=bx.Descent(OPTIMISERS["momentum"], num_steps=9),
        rule=bx.Truncated(num_steps=9),
    )
    expected = reference(OPTIMISERS["momentum"], 9, ORACLE.theta)
    assert relative_error(whole.grad, expected) < 1e-12


def test_truncated_at_a_solution_is_the_neumann_series():
    oracle, step, num_terms = ORACLE, 0.7, 5
    x_star = jnp.asarray(oracle.x_star)
    truncated, _ = bx.hypergradient(
        oracle.problem,
        x_star,
        oracle.theta,
        inner_solver=bx.Descent(optax.sgd(step), num_steps=30),
        rule=bx.Truncated(num_steps=num_terms),
    )
    neumann, _ = bx.hypergradient(
        oracle.problem,
        x_star,
        oracle.theta,
        inner_solver=bx.Given(),
        rule=bx.Implicit(bx.linear.Neumann(num_terms=num_terms, step_size=step)),
    )
    assert relative_error(truncated.grad, neumann.grad) < 1e-12
    assert relative_error(truncated.grad, oracle.hypergradient) > 1e-4


def test_learned_step_size():
    oracle = learned_step_size()
    solver = bx.Descent(optax.sgd(1.0), num_steps=10)
    unrolled, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=bx.Unrolled()
    )
    assert relative_error(unrolled.grad, oracle.hypergradient) < 1e-12
    # the same through the optimiser's own parameter
    objective = oracle.problem.inner

    def plain(x, theta):
        return objective(x, theta) / theta

    problem = bx.Bilevel(plain, oracle.problem.outer, outer_data=oracle.problem.outer_data)
    learned = bx.Descent(lambda theta: optax.sgd(theta), num_steps=10)
    again, _ = bx.hypergradient(
        problem, oracle.x0, oracle.theta, inner_solver=learned, rule=bx.Unrolled()
    )
    assert relative_error(again.grad, oracle.hypergradient) < 1e-12
    implicit, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=bx.NewtonCG(rtol=1e-12)
    )
    assert abs(float(implicit.grad)) < 1e-9


@pytest.mark.parametrize(
    "solver",
    [optx.GradientDescent(0.3, 1e-30, 1e-30), optx.OptaxMinimiser(optax.sgd(0.3), 1e-30, 1e-30)],
    ids=["GradientDescent", "OptaxMinimiser"],
)
def test_optimistix_steps_are_unrolled_exactly(solver):
    def loop(theta, num_steps):
        x = start(theta)
        for _ in range(num_steps):
            x = x - 0.3 * ORACLE.problem.inner.residual(x, theta)
        return ORACLE.problem.outer_value(x, theta)[0]

    # Optimistix' GradientDescent spends its first step on an evaluation
    lag = 1 if isinstance(solver, optx.GradientDescent) else 0
    rules = (bx.Unrolled(num_steps=8), bx.Unrolled()) if lag else (bx.Unrolled(),)
    for rule in rules:
        estimate, _ = bx.hypergradient(
            ORACLE.problem,
            start,
            ORACLE.theta,
            inner_solver=bx.Optimistix(solver, max_steps=8),
            rule=rule,
        )
        expected = jax.grad(loop)(ORACLE.theta, 8 - lag)
        assert relative_error(estimate.grad, expected) < 1e-12


def test_unrolling_a_converged_quasi_newton_solver_is_finite_and_right():
    for rule in (bx.Unrolled(), bx.Unrolled(num_steps=60)):
        estimate, _ = bx.hypergradient(
            ORACLE.problem,
            ORACLE.x0,
            ORACLE.theta,
            inner_solver=optx.BFGS(rtol=1e-10, atol=1e-10),
            rule=rule,
        )
        assert relative_error(estimate.grad, ORACLE.hypergradient) < 1e-6


def test_truncated_refuses_solvers_whose_last_steps_are_rejected_trials():
    best = optx.BestSoFarMinimiser(optx.LBFGS(1e-9, 1e-9))
    for solver in (optx.BFGS(1e-9, 1e-9), best, bx.LBFGS(), bx.NewtonCG(dense=True)):
        with pytest.raises(TypeError, match="rejected trials"):
            bx.hypergradient(
                ORACLE.problem,
                ORACLE.x0,
                ORACLE.theta,
                inner_solver=solver,
                rule=bx.Truncated(num_steps=5),
            )


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 30])
@pytest.mark.parametrize("checkpoints", ["sqrt", "all", 1, 4])
def test_repeat_takes_exactly_the_steps(length, checkpoints):
    out = repeat(
        lambda c: (c[0] + 1, c[1] * 1.1), (jnp.zeros(()), jnp.ones(())), length, checkpoints
    )
    assert float(out[0]) == length
    np.testing.assert_allclose(out[1], 1.1**length, rtol=1e-12)


def test_memory_is_of_order_sqrt():
    size, num_steps = 1_000, 10_000
    solver = bx.Descent(optax.sgd(1e-3), num_steps=num_steps)
    problem = bx.Bilevel(
        lambda x, t: 0.5 * jnp.sum(jnp.exp(t) * x**2) - jnp.sum(jnp.sin(x)),
        lambda x, t: jnp.sum(x**2),
    )

    def grad(theta):
        estimate, _ = bx.hypergradient(
            problem, jnp.ones(size), theta, inner_solver=solver, rule=bx.Unrolled()
        )
        return estimate.grad

    compiled = jax.jit(grad).lower(jnp.zeros(size)).compile()
    carries = compiled.memory_analysis().temp_size_in_bytes / (8 * size)
    assert carries < 4 * num_steps**0.5


def test_jvp_through_unrolled_steps():
    x_star = bx.argmin(ORACLE.problem.inner, bx.Descent(optax.sgd(0.3), num_steps=7), bx.Unrolled())
    tangent = jnp.cos(jnp.arange(6.0))
    _, x_dot = jax.jvp(lambda t: x_star(start, t), (ORACLE.theta,), (tangent,))

    def loop(theta):
        x = start(theta)
        for _ in range(7):
            x = x - 0.3 * ORACLE.problem.inner.residual(x, theta)
        return x

    _, expected = jax.jvp(loop, (ORACLE.theta,), (tangent,))
    assert relative_error(x_dot, expected) < 1e-12
