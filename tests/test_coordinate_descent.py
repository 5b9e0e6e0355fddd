"""Sweeps against scikit-learn's, the dual of a support vector machine, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet

import bilevax as bx

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 12))
Y = X[:, :4] @ np.array([2.0, -1.0, 1.0, 0.5]) + 0.5 * RANDOM.normal(size=40)


def loss(x, theta, data):
    del theta
    return 0.5 * jnp.mean((data[0] @ x - data[1]) ** 2)


def solved(condition, x0, theta, num_steps):
    solver = bx.CoordinateDescent(num_steps)
    return jax.jit(lambda x0, theta: solver.solve(condition, x0, theta, None)[0].x)(x0, theta)


def test_sweeps_are_those_of_scikit_learn():
    condition = bx.ProximalMinimum(loss, bx.prox.ElasticNet(0.05, 0.05), (X, Y))
    other = ElasticNet(0.1, l1_ratio=0.5, fit_intercept=False, max_iter=3, tol=0.0)
    with pytest.warns(ConvergenceWarning):
        expected = other.fit(X, Y).coef_
    np.testing.assert_allclose(solved(condition, jnp.zeros(12), None, 3), expected, atol=1e-13)


# A class costs exp(theta_k); labels; an entry without curvature; and features that move.
LABELS = np.where(RANDOM.random(16) < 0.5, 1.0, -1.0)
ROWS = np.concatenate([LABELS[:15, None] * X[:15, :3], np.zeros((1, 3))])


def dual(x, theta):
    rows = ROWS * (1 + 0.1 * theta[0])
    return 0.5 * jnp.sum((rows.T @ x) ** 2) - jnp.sum(x)


SVM = bx.ProximalMinimum(dual, bx.prox.Box(0.0, lambda t: jnp.exp(t)[(LABELS > 0).astype(int)]))


def vector(x, theta):
    del theta
    return jnp.sum(jnp.sin(jnp.arange(16.0)) * x)


def test_the_dual_of_a_support_vector_machine():
    theta = jnp.array([-1.0, -0.5])
    found = bx.argmin(SVM, bx.CoordinateDescent(20_000, rtol=1e-10))(jnp.zeros(16), theta)
    rule = ROWS.T @ found  # only this is unique
    expected = ROWS.T @ bx.argmin(SVM, bx.ProximalNewton(rtol=1e-10))(jnp.zeros(16), theta)
    np.testing.assert_allclose(rule, expected, atol=1e-7)
    assert float(found[15]) == pytest.approx(np.exp(theta[int(LABELS[15] > 0)]))


@pytest.mark.parametrize("rule", [bx.Unrolled(), bx.ForwardMode()], ids=str)
def test_few_sweeps_are_differentiated(rule):
    """Of three sweeps, far from the solution: the Hessian, too, depends on theta."""
    problem, theta = bx.Bilevel(SVM, vector), jnp.array([-1.0, -0.5])
    options = {"inner_solver": bx.CoordinateDescent(3), "rule": rule, "throw": False}
    found, _ = bx.hypergradient(problem, jnp.full(16, 0.05), theta, **options)

    def value(theta):
        return float(vector(solved(SVM, jnp.full(16, 0.05), theta, 3), theta))

    expected = [(value(theta + d) - value(theta - d)) / 2e-6 for d in 1e-6 * np.eye(2)]
    np.testing.assert_allclose(found.grad, expected, rtol=1e-7)


def test_a_model_in_single_precision_in_a_batch():
    """Three models of a dictionary in one program, each as alone; the bias has no term."""
    x32, y32 = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    def fit(model, theta):
        del theta
        return 0.5 * jnp.mean((x32 @ model["w"] + model["b"] - y32) ** 2)

    terms = {"w": bx.prox.L1(lambda t: jnp.exp(t)), "b": None}
    problem = bx.Bilevel(bx.ProximalMinimum(fit, terms), fit)
    start = {"w": jnp.zeros(12, jnp.float32), "b": jnp.zeros((), jnp.float32)}
    solver = bx.CoordinateDescent(1_000, rtol=1e-5)

    def grad(theta, inner_solver=solver):
        options = {"inner_solver": inner_solver, "throw": False}
        return bx.hypergradient(problem, start, theta, **options)[0]

    thetas = jnp.array([-4.0, -2.0, -1.0], jnp.float32)
    found = jax.jit(jax.vmap(grad))(thetas)
    assert found.grad.dtype == jnp.float32
    assert set(np.asarray(found.result == bx.RESULTS.successful)) == {True}
    expected = jax.jit(jax.vmap(lambda theta: grad(theta, None)))(thetas)
    np.testing.assert_allclose(found.grad, expected.grad, rtol=1e-3)


def test_what_it_cannot_solve_is_refused():
    def log_loss(x, theta):
        del theta
        return jnp.sum(jnp.logaddexp(0.0, X @ x))

    solver = bx.CoordinateDescent(10)
    many = bx.ProximalMinimum(lambda x, theta: jnp.sum(x**2), bx.prox.L1(0.1))
    for condition, size, error, message in (
        (bx.ProximalMinimum(log_loss, bx.prox.L1(0.1)), 12, TypeError, "depends on x"),
        (bx.ProximalMinimum(loss, bx.prox.Simplex(), (X, Y)), 12, TypeError, r"bx.prox.Simplex\("),
        (bx.Minimum(loss, (X, Y)), 12, TypeError, "ProximalMinimum"),
        (many, 5_000, ValueError, "5,000"),
    ):
        problem = bx.Bilevel(condition, lambda x, theta: theta * jnp.sum(x))
        with pytest.raises(error, match=message):
            bx.hypergradient(problem, jnp.zeros(size), 0.0, inner_solver=solver)
    with pytest.raises(ValueError, match="num_steps"):
        bx.CoordinateDescent(0)


def test_what_it_costs_is_counted():
    condition = bx.ProximalMinimum(loss, bx.prox.L1(0.1), (X, Y))
    solver = bx.CoordinateDescent(7)
    solution = jax.jit(lambda x: solver.solve(condition, x, None, None)[0])(jnp.zeros(12))
    assert int(solution.counts.num_gradients) == 7 + 1  # and one to judge it
    assert int(solution.counts.num_hessian_products) >= 12
