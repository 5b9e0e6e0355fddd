"""One step, K steps, SAMA and the Jacobian-free rule against closed forms and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import fixed_point, logistic, quadratic, relative_error, root

ORACLE = logistic()
SIZE = 20_000
CURVATURE = jnp.linspace(0.05, 1.0, SIZE)
CROSS = jnp.cos(jnp.outer(0.3 * jnp.arange(1.0 * SIZE), jnp.arange(1.0, 4.0)) + 0.2)
TARGET = jnp.sin(0.7 * jnp.arange(1.0 * SIZE))


def large_inner(x, theta):
    return 0.5 * jnp.sum(CURVATURE * x**2) - jnp.sum(x * (CROSS @ theta))


def large_outer(x, theta):
    del theta
    return 0.5 * jnp.sum((x - TARGET) ** 2)


def estimate_at(oracle, rule, solver=None, throw=True):
    solver = bx.Given() if solver is None else solver
    x = jax.tree_util.tree_map(jnp.asarray, oracle.x_star)
    return bx.hypergradient(
        oracle.problem, x, oracle.theta, inner_solver=solver, rule=rule, throw=throw
    )[0]


# ---- how the error falls --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_error_in_twenty_thousand_variables_falls_as_the_contraction_says():
    theta = jnp.array([0.5, -1.0, 0.8])
    x_star = (CROSS @ theta) / CURVATURE
    v_star = (x_star - TARGET) / CURVATURE
    problem = bx.Bilevel(large_inner, large_outer)
    one, _ = bx.hypergradient(problem, x_star, theta, inner_solver=bx.Given(), rule=bx.OneStep())
    step = float(one.v[0] / (x_star - TARGET)[0])
    rho = 1 - step * float(CURVATURE[0])
    assert 0.9 < step < 1.1  # one over the largest eigenvalue, nearly

    def grad(num_steps):
        def value(theta):
            x = optx.minimise(
                large_inner,
                optx.LBFGS(1e-9, 1e-9),
                jnp.zeros(SIZE),
                args=theta,
                adjoint=bx.KStep(num_steps),
                max_steps=500,
            ).value
            return large_outer(x, theta)

        return jax.jit(jax.grad(value)).lower(theta).compile()

    exact, errors, memory = CROSS.T @ v_star, [], []
    for num_steps in (1, 4, 16, 64):
        compiled = grad(num_steps)
        error = np.linalg.norm(compiled(theta) - exact)
        # v - v_K = (I - s A)^K v
        expected = np.linalg.norm(CROSS.T @ ((1 - step * CURVATURE) ** num_steps * v_star))
        assert error == pytest.approx(expected, rel=1e-4)
        errors.append(error / np.linalg.norm(exact))
        assert errors[-1] < 2 * rho**num_steps
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert errors[-1] > 0.05 * rho**64
    assert memory[-1] <= memory[0] + 8 * SIZE  # no term is kept
    assert memory[0] < 100 * 8 * SIZE


def test_series_is_neumann_and_its_remainder_is_estimated():
    for num_steps, factor in ((5, 1.6), (40, 1.1)):
        rule = bx.KStep(num_steps, step_size=0.7)
        estimate = estimate_at(ORACLE, rule)
        neumann = estimate_at(ORACLE, bx.Implicit(bx.linear.Neumann(num_steps, 0.7)))
        assert relative_error(estimate.grad, neumann.grad) < 1e-12
        assert float(estimate.adjoint_residual) == pytest.approx(float(neumann.adjoint_residual))
        error = np.linalg.norm(estimate.grad - ORACLE.hypergradient)
        assert error / factor < float(estimate.error_estimate) < error * factor


def test_an_equation_is_the_neumann_series_of_the_normal_equations():
    oracle, step, num_steps = root(), 0.04, 30
    theta = oracle.theta

    def flat(x):
        return jnp.concatenate([x["state"], x["offset"][None]])

    jacobian = jax.jacobian(oracle.problem.inner.residual)(
        jax.tree_util.tree_map(jnp.asarray, oracle.x_star), theta
    )
    A = np.zeros((4, 4))
    A[:3, :3], A[:3, 3] = jacobian["state"]["state"], jacobian["state"]["offset"]
    A[3, :3], A[3, 3] = jacobian["offset"]["state"], jacobian["offset"]["offset"]
    b = np.asarray(flat(oracle.x_star)) - 1
    expected = sum(
        step * A @ np.linalg.matrix_power(np.eye(4) - step * A.T @ A, j) @ b
        for j in range(num_steps)
    )
    estimate = estimate_at(oracle, bx.KStep(num_steps, step))
    np.testing.assert_allclose(flat(estimate.v), expected, rtol=1e-12)
    residual = np.linalg.norm(b - A.T @ expected) / np.linalg.norm(b)
    assert float(estimate.adjoint_residual) == pytest.approx(residual)
    # measured, it contracts by 1 - 1/kappa^2 or nearly
    rho = 1 - 1 / (1.1 * np.linalg.cond(A) ** 2)
    measured = estimate_at(oracle, bx.KStep(60))
    assert relative_error(measured.grad, oracle.hypergradient) < 3 * rho**60


def test_one_step_of_newton_is_the_implicit_answer():
    for oracle in (root(), fixed_point(), quadratic()):
        estimate, _ = bx.hypergradient(
            oracle.problem,
            oracle.x0,
            oracle.theta,
            inner_solver=optx.Newton(1e-10, 1e-10),
            rule=bx.OneStep(),
        )
        assert relative_error(estimate.grad, oracle.hypergradient) < 1e-8
        assert float(estimate.adjoint_residual) < 1e-8
        assert float(estimate.error_estimate) < 1e-8


# ---- whose step it is -----------------------------------------------------------------


def test_the_step_is_that_of_the_solver_where_it_has_one():
    b = ORACLE.problem.outer_value
    grad_x = jax.grad(lambda x: b(x, ORACLE.theta)[0])
    descent = optx.GradientDescent(0.3, 1e-10, 1e-10)
    estimate = estimate_at(ORACLE, bx.OneStep(), descent)
    np.testing.assert_allclose(estimate.v, 0.3 * grad_x(estimate.x), rtol=1e-12)
    # and another one is taken on request
    estimate = estimate_at(ORACLE, bx.OneStep(0.1), descent)
    np.testing.assert_allclose(estimate.v, 0.1 * grad_x(estimate.x), rtol=1e-12)
    damped = optx.FixedPointIteration(1e-12, 1e-12, damp=0.3)
    oracle = fixed_point()
    estimate = estimate_at(oracle, bx.OneStep(), damped)
    np.testing.assert_allclose(estimate.v, 0.7 * oracle.problem.outer_data, rtol=1e-12)


OPTIMISERS = {
    "momentum": optax.sgd(0.2, momentum=0.8),
    "adam": optax.adam(0.05, eps_root=1e-12),
}


def loop(optimiser, num_steps, num_more, theta):
    """A Python loop, its first steps detached."""
    x, state = ORACLE.x0, optimiser.init(ORACLE.x0)
    for k in range(num_steps + num_more):
        at = jax.lax.stop_gradient(theta) if k < num_steps else theta
        updates, state = optimiser.update(ORACLE.problem.inner.residual(x, at), state, x)
        x = optax.apply_updates(x, updates)
    return x


@pytest.mark.parametrize(("name", "num_more"), [("adam", 1), ("momentum", 3)])
@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_more_updates_equal_a_python_loop(name, num_more):
    solver = bx.Descent(OPTIMISERS[name], num_steps=7)
    rule = bx.OneStep() if num_more == 1 else bx.KStep(num_more)

    def value(theta):
        x = loop(OPTIMISERS[name], 7, num_more, theta)
        return ORACLE.problem.outer_value(x, theta)[0]

    with jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(jax.grad(value))(ORACLE.theta)
    estimate, _ = bx.hypergradient(
        ORACLE.problem, ORACLE.x0, ORACLE.theta, inner_solver=solver, rule=rule
    )
    assert relative_error(estimate.grad, expected) < 1e-12
    x_star = bx.argmin(ORACLE.problem.inner, solver, rule)

    def solved(theta):
        return ORACLE.problem.outer_value(x_star(ORACLE.x0, theta), theta)[0]

    @jax.jit  # one program
    def both(theta):
        return jax.grad(solved)(theta), jax.jvp(solved, (theta,), (jnp.ones(6),))[1]

    grad, slope = both(ORACLE.theta)
    assert relative_error(grad, expected) < 1e-12
    assert float(slope) == pytest.approx(float(jnp.sum(expected)), rel=1e-9)
    with pytest.raises(TypeError, match="second derivative"):
        jax.hessian(solved)(ORACLE.theta)


def test_a_solver_that_has_met_its_tolerance_still_has_a_step():
    # The step of a converged Descent returns x as it is: its derivative would say that
    # theta has no influence.
    for solver in (bx.Descent(optax.sgd(0.7), 5_000, rtol=1e-9), bx.Descent(optax.sgd(0.7), 500)):
        estimate = estimate_at(ORACLE, bx.KStep(200), solver)
        assert relative_error(estimate.grad, ORACLE.hypergradient) < 1e-8


def test_estimates_of_own_steps_tell_their_error():
    estimate = estimate_at(ORACLE, bx.KStep(30), bx.Descent(optax.sgd(0.7), 100))
    error = np.linalg.norm(estimate.grad - ORACLE.hypergradient)
    assert error / 1.3 < float(estimate.error_estimate) < error * 1.3
    series = estimate_at(ORACLE, bx.KStep(30, step_size=0.7))
    assert float(estimate.error_estimate) == pytest.approx(float(series.error_estimate), rel=1e-6)
    assert float(estimate.adjoint_residual) == pytest.approx(
        float(series.adjoint_residual), rel=1e-6
    )


# ---- flags ----------------------------------------------------------------------------

GROWING = bx.Bilevel(bx.FixedPoint(lambda x, t: 3 * x - 2 * t), lambda x, t: jnp.sum(x**2))
PARABOLA = bx.Bilevel(lambda x, t: 1.5 * jnp.sum((x - t) ** 2), lambda x, t: jnp.sum(x**2))


@pytest.mark.parametrize(
    ("problem", "solver", "rule"),
    [
        (GROWING, bx.Given(), bx.KStep(3)),
        (GROWING, bx.Given(), bx.JacobianFree()),
        (PARABOLA, bx.Given(), bx.OneStep(step_size=1.0)),
        (PARABOLA, bx.Descent(optax.sgd(1.0), 1), bx.KStep(2)),
        (PARABOLA, bx.Descent(optax.sgd(1.0), 1), bx.SAMA()),
    ],
    ids=["map", "JacobianFree", "step size", "Descent", "SAMA"],
)
@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_steps_that_do_not_contract_are_flagged(problem, solver, rule):
    theta = jnp.ones(2)
    estimate, _ = bx.hypergradient(
        problem, theta, theta, inner_solver=solver, rule=rule, throw=False
    )
    assert estimate.result == bx.RESULTS.diverged
    assert not float(estimate.error_estimate) < 1e300
    for throw in (True, False):
        x_star = bx.argmin(problem.inner, solver, rule, throw=throw)
        grad = jax.jit(
            jax.grad(lambda theta, x_star=x_star: jnp.sum(x_star(jnp.ones(2), theta) ** 2))
        )
        if throw:
            with pytest.raises(RuntimeError, match="diverged"):
                jax.block_until_ready(grad(theta))
        else:
            assert bool(jnp.all(jnp.isnan(grad(theta))))


@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_divergence_inside_optimistix_is_an_error():
    def value(theta, solver):
        x = optx.minimise(
            lambda x, t: PARABOLA.inner(x, t),
            solver,
            theta_free,
            args=theta,
            adjoint=bx.OneStep(),
        ).value
        return jnp.sum(x**2)

    theta_free = jnp.ones(2)
    solver = optx.OptaxMinimiser(optax.sgd(1.0), 1e-6, 1e-6)
    with pytest.raises(RuntimeError, match="diverged"):
        jax.block_until_ready(jax.grad(value)(jnp.ones(2), solver))


def optimistix_value(rule):
    def value(theta):
        x = optx.minimise(
            lambda x, t: ORACLE.problem.inner(x, t),
            optx.BFGS(1e-9, 1e-9),
            ORACLE.x0,
            args=theta,
            adjoint=rule,
            max_steps=500,
        ).value
        return ORACLE.problem.outer_value(x, theta)[0]

    return value


def argmin_value(rule):
    x_star = bx.argmin(ORACLE.problem.inner, bx.Descent(optax.sgd(0.7), 200), rule)
    return lambda theta: ORACLE.problem.outer_value(x_star(ORACLE.x0, theta), theta)[0]


@pytest.mark.parametrize("view", [optimistix_value, argmin_value])
def test_a_rough_answer_without_an_estimate_is_a_warning(view):
    with pytest.warns(UserWarning, match="more than a tenth of the adjoint system"):
        rough = jax.jit(jax.grad(view(bx.OneStep())))(ORACLE.theta)
    assert relative_error(rough, ORACLE.hypergradient) > 0.05
    fine = jax.jit(jax.grad(view(bx.KStep(100))))(ORACLE.theta)  # any warning is an error
    assert relative_error(fine, ORACLE.hypergradient) < 0.01


def test_bad_arguments_are_refused():
    for make in (lambda: bx.KStep(0), lambda: bx.KStep(2.0), lambda: bx.KStep(1, step_size=-1.0)):
        with pytest.raises(ValueError, match="must be"):
            make()
    for rule in (bx.OneStep, bx.JacobianFree):
        with pytest.raises(ValueError, match="must be positive"):
            rule(step_size=0.0)
    with pytest.raises(TypeError, match="`SAMA` differentiates the update"):
        estimate_at(ORACLE, bx.SAMA(), bx.NewtonCG())
    with pytest.raises(TypeError, match="`SAMA` differentiates the update"):
        optx.minimise(
            PARABOLA.inner.fn,
            optx.BFGS(1e-6, 1e-6),
            jnp.zeros(2),
            args=jnp.ones(2),
            adjoint=bx.SAMA(),
        )


# ---- SAMA -----------------------------------------------------------------------------


def test_sama_has_the_closed_form_of_adam():
    rate, b1, b2, eps = 0.05, 0.9, 0.99, 1e-3
    optimiser, num_steps = optax.adam(rate, b1, b2, eps), 6
    x, theta = ORACLE.x0, ORACLE.theta
    gradient, m, second = ORACLE.problem.inner.residual, jnp.zeros(6), jnp.zeros(6)
    for k in range(1, num_steps + 2):
        g = gradient(x, theta)
        m, second = b1 * m + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        c1, c2 = 1 - b1**k, 1 - b2**k
        s = jnp.sqrt(second / c2)
        if k <= num_steps:
            x = x - rate * m / c1 / (s + eps)
    D = rate * ((1 - b1) / c1 / (s + eps) - (1 - b2) / c2 * (m / c1) * g / (s * (s + eps) ** 2))
    value_grads = jax.grad(lambda x, t: ORACLE.problem.outer_value(x, t)[0], argnums=(0, 1))
    b, direct = value_grads(x, theta)
    _, pull = jax.vjp(lambda t: gradient(x, t), theta)
    estimate, _ = bx.hypergradient(
        ORACLE.problem,
        ORACLE.x0,
        theta,
        inner_solver=bx.Descent(optimiser, num_steps),
        rule=bx.SAMA(),
    )
    np.testing.assert_allclose(estimate.x, x, rtol=1e-12)
    np.testing.assert_allclose(estimate.v, D * b, rtol=1e-10)
    np.testing.assert_allclose(estimate.grad, direct - pull(D * b)[0], rtol=1e-10)


def test_sama_in_optimistix_and_argmin():
    oracle = quadratic(condition=5.0)
    solver = optx.OptaxMinimiser(optax.sgd(0.15), 1e-9, 1e-9)
    estimate, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=bx.SAMA()
    )

    def value(theta):
        x = optx.minimise(
            lambda x, theta: oracle.problem.inner(x, theta),
            solver,
            oracle.x0,
            args=theta,
            adjoint=bx.SAMA(),
            max_steps=1_000,
        ).value
        return oracle.problem.outer_value(x, theta)[0]

    assert relative_error(jax.jit(jax.grad(value))(oracle.theta), estimate.grad) < 1e-9
    x_star = bx.argmin(oracle.problem.inner, solver, bx.SAMA())
    x, x_dot = jax.jvp(
        lambda t: x_star(oracle.x0, t), (oracle.theta,), (jnp.ones_like(oracle.theta),)
    )
    np.testing.assert_allclose(x, estimate.x, rtol=1e-12)  # x itself, not one step further
    cross = jax.jacobian(lambda t: oracle.problem.inner.residual(x, t))(oracle.theta)
    np.testing.assert_allclose(x_dot, -0.15 * jnp.sum(cross, axis=1), rtol=1e-9)


# ---- the Jacobian-free rule -----------------------------------------------------------


def test_jacobian_free_replaces_the_jacobian_by_the_identity():
    oracle = fixed_point()
    c, W = np.asarray(oracle.problem.outer_data), np.asarray(oracle.problem.inner_data)
    slope = 1 - np.tanh(W @ oracle.x_star + np.asarray(oracle.theta)) ** 2
    for solver in (bx.Given(), optx.Newton(1e-11, 1e-11)):  # whatever the solver
        estimate = estimate_at(oracle, bx.JacobianFree(), solver)
        np.testing.assert_allclose(estimate.grad, slope * c, rtol=1e-9)
    estimate = estimate_at(ORACLE, bx.JacobianFree(step_size=1.0), throw=False)
    x = estimate.x
    b = jax.grad(lambda x: ORACLE.problem.outer_value(x, ORACLE.theta)[0])(x)
    np.testing.assert_allclose(estimate.v, b, rtol=1e-12)


@pytest.mark.parametrize("rule", [bx.KStep(3), bx.OneStep(), bx.JacobianFree(), bx.SAMA()])
def test_float32_pytrees_scalars_and_batches(rule):
    def inner(x, theta):
        return 0.5 * jnp.sum((x["a"] - theta) ** 2) + 0.5 * (x["b"] - 2 * theta) ** 2

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum(x["a"]) + x["b"] * theta)
    x0 = {"a": jnp.zeros(2, jnp.float32), "b": jnp.float32(0.0), "none": None}
    solver = bx.Descent(optax.sgd(0.5), num_steps=60)

    def grad(theta):
        estimate, _ = bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=rule)
        return estimate.grad

    # A = 1 and d_x L = (1, 1, theta); one step of 0.5, or 1/1.05, or three of 0.5
    factor = {bx.KStep: 0.875, bx.OneStep: 0.5, bx.SAMA: 0.5, bx.JacobianFree: 1 / 1.05}[type(rule)]
    thetas = jnp.array([1.0, -2.0], jnp.float32)
    expected = 2 * thetas + factor * (2 + 2 * thetas)
    batched = jax.jit(jax.vmap(grad))(thetas)
    assert batched.dtype == jnp.float32
    np.testing.assert_allclose(batched, expected, rtol=1e-5)
