"""Singular inner problems: the response of smallest norm, or a flag."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_problems import draw_singular, quadratic_problem

import bilevax as bx
from bilevax.testing import all_oracles, overparameterised, relative_error

ORACLE = overparameterised()


@pytest.mark.parametrize(
    "rule", [None, bx.MinimumNorm(), bx.MinimumNorm(max_tangents=1)], ids=["default", "p", "d"]
)
def test_hypergradient_of_an_overparameterised_problem(rule):
    estimate, state = bx.hypergradient(ORACLE.problem, ORACLE.x0, ORACLE.theta, rule=rule)
    assert relative_error(estimate.grad, ORACLE.hypergradient) < 1e-9
    warm, _ = bx.hypergradient(ORACLE.problem, ORACLE.x0, ORACLE.theta, rule=rule, state=state)
    assert relative_error(warm.grad, ORACLE.hypergradient) < 1e-9


def test_a_rule_of_your_own_is_not_exchanged():
    for rule in (bx.Implicit(bx.linear.CG()), bx.Implicit(error_estimate=True)):
        estimate, _ = bx.hypergradient(
            ORACLE.problem, ORACLE.x0, ORACLE.theta, rule=rule, throw=False
        )
        assert estimate.result == bx.RESULTS.singular


def test_under_jit_the_outcome_says_so():
    def run(theta):
        estimate, _ = bx.hypergradient(ORACLE.problem, ORACLE.x0, theta, throw=False)
        return estimate.result

    assert jax.jit(run)(ORACLE.theta) == bx.RESULTS.singular


def test_solution_map():
    x_star = bx.argmin(ORACLE.problem.inner, rule=bx.MinimumNorm())

    def value(theta):
        return ORACLE.problem.outer_value(x_star(ORACLE.x0, theta), theta)[0]

    assert relative_error(jax.grad(value)(ORACLE.theta), ORACLE.hypergradient) < 1e-9
    forward = jax.jacfwd(lambda theta: x_star(ORACLE.x0, theta))(ORACLE.theta)
    assert relative_error(forward, ORACLE.jacobian) < 1e-9


# A scalar, a tree, a Hessian that moves, residuals, and one whose system is not regular.
MINIMA = {"scalar_game", "nested", "logistic", "least_squares", "overparameterised"}


@pytest.mark.parametrize(
    "oracle",
    [oracle for oracle in all_oracles() if oracle.name in MINIMA],
    ids=lambda oracle: oracle.name,
)
def test_agrees_with_implicit_where_the_system_is_regular(oracle):
    rule = bx.MinimumNorm(max_tangents=1)
    solver = bx.NewtonCG(rtol=1e-12)
    estimate, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=rule
    )
    assert relative_error(estimate.grad, oracle.hypergradient) < 1e-8


def test_more_variables_than_are_factorised():
    data, theta, x, grad = draw_singular(3, 300, 40, 1.0, 0.0)
    for rule in (None, bx.MinimumNorm()):  # the adjoint form, by MINRES
        estimate, _ = bx.hypergradient(
            quadratic_problem(data),
            jnp.asarray(x),
            jnp.asarray(theta),
            inner_solver=bx.Given(rtol=1e-6),
            rule=rule,
        )
        assert relative_error(estimate.grad, grad) < 1e-5
        assert estimate.adjoint_residual > 0.1  # of an inconsistent system, reported


@pytest.mark.parametrize("max_tangents", [1, 100])
def test_without_a_differentiable_solution(max_tangents):
    data, theta, x, _ = draw_singular(4, 300, 40, 1.0, 1e-2)
    with pytest.raises(bx.SolveError, match="no hypergradient"):
        bx.hypergradient(
            quadratic_problem(data),
            jnp.asarray(x),
            jnp.asarray(theta),
            inner_solver=bx.Given(rtol=1e-6),
            rule=bx.MinimumNorm(max_tangents=max_tangents),
        )


def test_a_run_goes_over_and_says_so():
    method = bx.DoubleLoop(optimizer=bx.OuterLBFGS(), start="cold")
    solution = bx.solve(ORACLE.problem, ORACLE.x0, ORACLE.theta, method, num_steps=50)
    assert solution.stats["singular_since"] == 0
    assert solution.stats["num_flagged"] == 0
    assert "MinimumNorm" in str(solution)
    assert relative_error(solution.theta, ORACLE.theta_star) < 1e-6
    regular = bx.solve(
        bx.Bilevel(lambda x, t: (x - t) ** 2, lambda x, t: x**2),
        jnp.array(0.0),
        jnp.array(1.0),
        num_steps=3,
    )
    assert regular.stats["singular_since"] is None


def test_a_run_goes_over_in_the_middle():
    # The curvature along x[1] ends where theta[1] falls below one, and nothing depends on it.
    def inner(x, theta):
        strength = jnp.maximum(theta[1] - 1, 0) ** 2
        return 0.5 * (x[0] - theta[0]) ** 2 + 0.5 * strength * x[1] ** 2

    problem = bx.Bilevel(inner, lambda x, theta: (x[0] - 2) ** 2 + (x[1] - 1) ** 2 + theta[1] ** 2)
    solution = bx.solve(
        problem, jnp.zeros(2), jnp.array([0.0, 2.0]), bx.DoubleLoop(start="cold"), num_steps=150
    )
    assert 0 < solution.stats["singular_since"] < 150
    assert len(solution.history) == 151
    np.testing.assert_allclose(solution.theta, [2.0, 0.0], atol=0.05)


def test_jacobian_of_smallest_norm():
    rule = bx.Implicit(bx.linear.Direct(minimum_norm=True))
    x = jnp.asarray(ORACLE.x_star)
    found = bx.jacobian(ORACLE.problem, x, ORACLE.theta, rule=rule)
    assert relative_error(found.value, ORACLE.jacobian) < 1e-9


def test_refused():
    with pytest.raises(ValueError, match="max_tangents"):
        bx.MinimumNorm(max_tangents=0)


def _softmax(regularised_intercepts):
    """Digits of three kinds as people fit them: the intercepts matter up to a constant."""
    key = jax.random.key(0)
    features = jax.random.normal(key, (60, 4))
    labels = jnp.argmax(features[:, :3] + jnp.array([[0.3, 0, 0]]), axis=1)
    train, validation = (features[:40], labels[:40]), (features[40:], labels[40:])

    def loss(x, data):
        features, labels = data
        logits = features @ x["weights"] + x["intercepts"][None, :]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(picked)

    def inner(x, theta, data):
        penalty = jnp.exp(theta) @ jnp.sum(x["weights"] ** 2, axis=1)
        return loss(x, data) + penalty + regularised_intercepts * jnp.sum(x["intercepts"] ** 2)

    problem = bx.Bilevel(
        inner, lambda x, theta, data: loss(x, data), inner_data=train, outer_data=validation
    )
    x0 = {"weights": jnp.zeros((4, 3)), "intercepts": jnp.zeros(3)}
    return problem, x0, jnp.array([-3.0, -4.0, -3.5, -3.0])


def test_free_intercepts_have_one_answer_in_every_view():
    problem, x0, theta = _softmax(0.0)
    x_star = bx.argmin(problem)

    def value(theta):
        return problem.outer_value(x_star(x0, theta), theta)[0]

    estimate, _ = bx.hypergradient(problem, x0, theta)
    step = 1e-4 * jnp.eye(4)
    compiled, gradient = jax.jit(value), jax.jit(jax.grad(value))
    finite = jnp.array([(compiled(theta + e) - compiled(theta - e)) / 2e-4 for e in step])
    assert relative_error(estimate.grad, finite) < 1e-5
    reverse = gradient(theta)
    batched = jax.jit(jax.vmap(jax.grad(value)))(jnp.stack([theta, theta]))
    rows = bx.jacobian(problem, estimate.x, theta).value["intercepts"]
    _, moved = jax.jvp(value, (theta,), (step[0],))
    for grad in (reverse, batched[1]):
        assert relative_error(grad, estimate.grad) < 1e-8
    assert relative_error(moved / 1e-4, estimate.grad[0]) < 1e-8
    # Of the many responses the smallest: the intercepts do not move together.
    assert jnp.all(jnp.abs(rows.sum(axis=0)) < 1e-8 * jnp.abs(rows).max())
    # The derivative of the derivative, too.
    hessian = jax.jit(jax.jacfwd(jax.grad(value)))(theta)
    slope = (gradient(theta + step[1]) - gradient(theta - step[1])) / 2e-4
    assert relative_error(hessian[:, 1], slope) < 1e-4


def test_a_solution_map_with_a_kink_is_still_singular():
    # x = theta^(1/3): no derivative at zero, whatever the outer objective sees.
    x_star = bx.argmin(bx.Minimum(lambda x, theta: jnp.sum(x**4) / 4 - theta * x[0]))
    with pytest.raises(Exception, match="singular"):
        jax.grad(lambda theta: jnp.sum(x_star(jnp.zeros(2), theta)))(0.0)


def test_many_variables_by_products():
    data, theta, x, grad = draw_singular(3, 300, 40, 1.0, 0.0)
    problem = quadratic_problem(data)
    x_star = bx.argmin(problem)
    found = jax.grad(lambda theta: problem.outer_value(x_star(x, theta), theta)[0])(theta)
    assert relative_error(found, grad) < 1e-5
