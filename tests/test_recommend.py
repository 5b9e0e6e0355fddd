"""`recommend`: the rule that is right, for the measured reason."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
import bilevax.testing as bt


def inner(x, theta):
    return jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2)


def outer(x, theta):
    del theta
    return jnp.sum((x - 0.4) ** 2)


PROBLEM = bx.Bilevel(inner, outer)
X0, THETA = jnp.zeros(3), jnp.array([-1.0, 0.0, 1.0])


def grad(rule, **options):
    return bx.hypergradient(PROBLEM, X0, THETA, rule=rule, **options)[0].grad


def test_few_variables_are_solved_directly_and_exactly():
    advice = bx.recommend(PROBLEM, X0, THETA)
    assert advice.rule == bx.Implicit()
    x = 1 / (1 + np.exp(THETA))
    exact = -2 * (x - 0.4) * x * (1 - x)
    assert bt.relative_error(grad(advice.rule), exact) < 1e-6
    assert advice.measured["size_x"] == 3
    assert advice.measured["condition"] == pytest.approx((1 + np.e) / (1 + 1 / np.e))
    assert "bx.Implicit()" in str(advice)
    assert advice.to_dict()["rule"] == "bx.Implicit()"


@pytest.mark.parametrize(("num_steps", "rule"), [(3, bx.Unrolled), (200, bx.Implicit)])
def test_where_the_steps_end_decides(num_steps, rule):
    descent = bx.Descent(optax.sgd(0.1), num_steps=num_steps)
    advice = bx.recommend(PROBLEM, X0, THETA, inner_solver=descent)
    assert isinstance(advice.rule, rule)
    assert advice.inner_solver is descent
    if num_steps == 3:
        assert f"after {num_steps} steps" in advice.reason
        assert 0 < advice.measured["contraction"] < 1
        assert advice.measured["state_bytes"] == 3 * 8


def test_a_learned_step_size_is_differentiated_forwards():
    descent = bx.Descent(lambda theta: optax.sgd(jnp.exp(theta)), num_steps=5)
    plain = bx.Bilevel(lambda x, theta: jnp.sum((x - 1.0) ** 2), outer)
    advice = bx.recommend(plain, X0, jnp.array(-2.0), inner_solver=descent)
    assert isinstance(advice.rule, bx.ForwardMode)
    assert advice.measured["cross_norm"] == 0
    assert "optimiser is a function of theta" in advice.reason


def test_a_learned_start_is_unrolled_in_the_memory_given():
    descent = bx.Descent(optax.sgd(0.1), num_steps=4)
    plain = bx.Bilevel(lambda x, theta: jnp.sum((x - 1.0) ** 2), outer)
    options = {"inner_solver": descent}
    assert bx.recommend(plain, lambda t: t, THETA, **options).rule == bx.Unrolled(checkpoints="all")
    advice = bx.recommend(plain, lambda t: t, THETA, memory=10_000, **options)
    assert advice.rule == bx.Unrolled(checkpoints=bx.MemoryBudget(10_000))


def test_many_solutions_get_the_response_of_smallest_norm():
    problem = bx.Bilevel(lambda x, theta: (x[0] + 2 * x[1] - theta) ** 2, outer)
    advice = bx.recommend(problem, jnp.zeros(2), jnp.array(1.0))
    assert "singular" in advice.reason
    estimate, _ = bx.hypergradient(problem, jnp.zeros(2), jnp.array(1.0), rule=advice.rule)
    # x = theta (1, 2) / 5, the solution nearest to the start
    exact = 2 * (0.2 - 0.4) * 0.2 + 2 * (0.4 - 0.4) * 0.4
    assert float(estimate.grad) == pytest.approx(exact, rel=1e-6)


def test_a_saddle_point_is_not_passed_in_silence():
    problem = bx.Bilevel(lambda x, theta: x[0] ** 2 - x[1] ** 2 + theta * x[0], outer)
    descent = bx.Descent(optax.sgd(0.1), num_steps=4)
    advice = bx.recommend(problem, jnp.array([1.0, 0.1]), jnp.array(1.0), inner_solver=descent)
    assert isinstance(advice.rule, bx.Unrolled | bx.ForwardMode)
    assert "curvature" in advice.warning
    assert "WARNING" in str(advice)


def test_the_accuracy_asked_for_decides_the_linear_solve():
    problem = bx.Bilevel(inner, outer)
    x0, theta = jnp.zeros(60), jnp.linspace(-5.0, 5.0, 60)
    exact = bx.hypergradient(problem, x0, theta, rule=bx.Implicit(bx.linear.CG(rtol=1e-12)))[0].grad
    products = []
    for rtol in (1e-1, 1e-5):
        advice = bx.recommend(problem, x0, theta, rtol=rtol)
        estimate, _ = bx.hypergradient(problem, x0, theta, rule=advice.rule)
        assert bt.relative_error(estimate.grad, exact) < rtol
        products.append(advice.measured["num_adjoint_products"])
    assert products[0] < products[1]


def test_the_advice_is_taken_in_solve():
    method = bx.DoubleLoop(bx.Descent(optax.sgd(0.1), num_steps=3), start="cold")
    advice = bx.recommend(PROBLEM, X0, THETA, inner_solver=method.inner_solver)
    taken = bx.solve(PROBLEM, X0, THETA, method, rule=advice.rule, num_steps=3)
    rule = bx.Unrolled(checkpoints="all")
    by_name = bx.solve(PROBLEM, X0, THETA, method, rule=rule, num_steps=3)
    np.testing.assert_array_equal(taken.theta, by_name.theta)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="between 0 and 1"):
        bx.recommend(PROBLEM, X0, THETA, rtol=2.0)
    with pytest.raises(ValueError, match="bytes"):
        bx.recommend(PROBLEM, X0, THETA, memory=-1)
    with pytest.raises(TypeError, match="bx.recommend"):
        bx.solve(PROBLEM, X0, THETA, rule="auto")
    with pytest.raises(TypeError, match="rule must be"):
        bx.solve(PROBLEM, X0, THETA, rule="best")
    with pytest.raises(TypeError, match="rule must be"):
        bx.solve(PROBLEM, X0, THETA, rule=optax.adam(0.1))
    method = bx.DoubleLoop(hypergradient=bx.Unrolled())
    with pytest.raises(ValueError, match="Leave out one"):
        bx.solve(PROBLEM, X0, THETA, method, rule=bx.Implicit())
    with pytest.raises(ValueError, match="Leave out one"):
        bx.solve(PROBLEM, X0, THETA, bx.MAID(), rule=bx.Implicit())


def test_a_solve_that_is_not_finite_is_refused():
    descent = bx.Descent(optax.sgd(1e300), num_steps=20)
    with pytest.raises(ValueError, match="NaN"):
        bx.recommend(PROBLEM, X0 + 0.3, THETA, inner_solver=descent)
