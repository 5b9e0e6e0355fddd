"""Under `jax_debug_nans` and `jax_debug_infs`: silence where all is well, else the user's line."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx


@pytest.fixture
def nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


# ---- nothing is lost: nothing is raised ------------------------------------------------


def target(x, theta):
    return jnp.sum((x - 0.4) ** 2)


QUADRATIC = bx.Bilevel(lambda x, t: jnp.sum((x - 1.0) ** 2 + jnp.exp(t) * x**2), target)
LOGISTIC = bx.Bilevel(
    lambda x, t: jnp.sum(jax.nn.softplus(1.0 - 2.0 * x)) + jnp.sum(jnp.exp(t) * x**2), target
)
ROOT = bx.Bilevel(bx.Root(lambda x, t: x + 0.1 * jnp.sin(x) - jnp.exp(t)), target)
FIXED_POINT = bx.Bilevel(bx.FixedPoint(lambda x, t: 0.3 * jnp.cos(x) + t), target)
X0, THETA = jnp.zeros(3), jnp.zeros(3)
# at x = 1 / (1 + e^t) = 1/2, where dx/dt = -1/4: 2 (0.5 - 0.4) (-1/4)
GRADIENT = -0.05 * np.ones(3)

STEPS = bx.Descent(optax.sgd(0.2), num_steps=60)
RULES = {
    "default": (bx.Implicit(), None),
    "CG": (bx.Implicit(bx.linear.CG()), bx.LBFGS()),
    "MINRES": (bx.Implicit(bx.linear.MINRES(indefinite=True)), bx.NewtonCG(dense=False)),
    "GMRES": (bx.Implicit(bx.linear.GMRES()), STEPS),
    "Chebyshev": (bx.Implicit(bx.linear.Chebyshev()), None),
    "accuracy": (bx.Accurate(1e-4), None),
    "Jacobi": (bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.Jacobi()), None),
    "MinimumNorm": (bx.MinimumNorm(), None),
    "Unrolled": (bx.Unrolled(), STEPS),
    "Truncated": (bx.Truncated(40), STEPS),
    "ForwardMode": (bx.ForwardMode(), STEPS),
    "KStep": (bx.KStep(40), STEPS),
    "SAMA": (bx.SAMA(), STEPS),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_silent_on_a_healthy_problem(name):
    rule, solver = RULES[name]
    with jax.debug_nans(True), jax.debug_infs(True):
        estimate, state = bx.hypergradient(QUADRATIC, X0, THETA, inner_solver=solver, rule=rule)
        again, _ = bx.hypergradient(
            QUADRATIC, X0, THETA, inner_solver=solver, rule=rule, state=state
        )
    for found in (estimate, again):
        if name != "SAMA":  # not a Newton step, but the direction of an optimiser's
            np.testing.assert_allclose(found.grad, GRADIENT, rtol=1e-3)


@pytest.mark.parametrize("problem", [LOGISTIC, ROOT, FIXED_POINT])
def test_the_views_are_silent_on_a_healthy_problem(problem):
    def value(theta):
        return target(bx.argmin(problem.inner)(X0, theta), theta)

    with jax.debug_nans(True), jax.debug_infs(True):
        estimate, _ = bx.hypergradient(problem, X0, THETA)
        gradient = jax.grad(value)(THETA)
        _, tangent = jax.jvp(value, (THETA,), (jnp.ones(3),))
        assert bx.check(problem, X0, THETA).outcome == "successful"
    np.testing.assert_allclose(gradient, estimate.grad, rtol=1e-5)
    np.testing.assert_allclose(tangent, jnp.sum(estimate.grad), rtol=1e-5)


@pytest.mark.parametrize("problem", [LOGISTIC, ROOT])
def test_a_run_is_silent_on_a_healthy_problem(problem):
    """A minimum and an equation: what a run does beyond a hypergradient knows no more of it."""
    with jax.debug_nans(True), jax.debug_infs(True):
        solution = bx.solve(problem, X0, THETA, num_steps=3)
    assert solution.result == bx.RESULTS.successful


def test_what_diagnoses_is_silent_on_a_healthy_problem():
    """What was not seen is absent, and neither NaN nor infinite."""
    many = bx.Bilevel(lambda x, t: jnp.sum((x - 1.0) ** 2 + jnp.exp(t) * x**2), target)
    with jax.debug_nans(True), jax.debug_infs(True):
        assert bx.recommend(QUADRATIC, X0, THETA, inner_solver=STEPS).rule is not None
        check = bx.check(many, jnp.full(300, 0.5), jnp.zeros(()))
        assert check.outcome == "successful"


def test_switched_on_later_no_old_program_is_taken():
    bx.hypergradient(QUADRATIC, X0, THETA, rule=bx.Implicit(error_estimate=True))
    with jax.debug_infs(True):
        bx.hypergradient(QUADRATIC, X0, THETA, rule=bx.Implicit(error_estimate=True))


# ---- a number is lost: the user's line -------------------------------------------------


def at_the_start(x, theta):
    return jnp.sum(jnp.log(x) + theta * x**2)  # lost here


def of_the_gradient(x, theta):
    return jnp.linalg.norm(x) + jnp.sum((x - theta) ** 2)  # lost here


def on_the_way(x, theta):
    return jnp.sum(theta * x + x**1.5)  # lost here


def of_the_outer_objective(x, theta):
    return jnp.sum(jnp.sqrt(x - 5.0))  # lost here


def of_an_equation(x, theta):
    return jnp.sqrt(x - 2.0) - theta  # lost here


LOST = {
    "start": (bx.Bilevel(at_the_start, target), -1.0, None),
    "gradient": (bx.Bilevel(of_the_gradient, target), 0.0, None),
    "way": (bx.Bilevel(on_the_way, target), 1.0, bx.Descent(optax.sgd(0.3), num_steps=50)),
    "outer": (bx.Bilevel(QUADRATIC.inner, of_the_outer_objective), 0.0, None),
    "root": (bx.Bilevel(bx.Root(of_an_equation), target), 1.0, optx.Newton(1e-8, 1e-8)),
}


def raised(fn):
    with pytest.raises(FloatingPointError) as caught:
        fn()
    return caught.value, "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", LOST)
def test_the_users_line_is_in_the_traceback(nans, name):
    problem, begin, solver = LOST[name]
    x0, theta = jnp.full(3, begin), jnp.ones(3)

    def hypergradient(theta):
        return bx.hypergradient(problem, x0, theta, inner_solver=solver)[0].grad

    def value(theta):
        x = bx.argmin(problem.inner, solver)(x0, theta)
        return problem.outer_value(x, theta)[0]

    calls = [hypergradient, jax.jit(hypergradient), jax.grad(value)]
    for call in calls if name == "start" else calls[:1]:
        _, text = raised(lambda call=call: call(theta))
        assert "# lost here" in text


def test_solve_shows_the_line_of_the_step_in_which_a_number_is_lost(nans):
    problem = bx.Bilevel(lambda x, t: jnp.sum((x - t) ** 2), lambda x, t: jnp.sum(x + jnp.sqrt(t)))
    method = bx.DoubleLoop(optimizer=optax.sgd(1.0))
    _, text = raised(lambda: bx.solve(problem, jnp.zeros(1), jnp.ones(1), method, num_steps=20))
    assert "jnp.sqrt(t)" in text


def test_a_solver_that_diverges_is_named(nans):
    problem = bx.Bilevel(lambda x, t: jnp.sum((x - t) ** 4), target)
    solver = bx.Descent(optax.sgd(1e4), num_steps=500)
    error, _ = raised(lambda: bx.hypergradient(problem, X0 + 3, THETA, inner_solver=solver))
    assert "diverge" in str(error) and "step size" in str(error)


def test_an_infinity_is_shown_too():
    problem = bx.Bilevel(lambda x, t: jnp.sum((x - t) ** 2), lambda x, t: jnp.sum(1.0 / x))
    with jax.debug_infs(True):
        _, text = raised(lambda: bx.hypergradient(problem, X0, THETA))
    assert "jnp.sum(1.0 / x)" in text


def test_without_the_switches_the_outcome_says_it():
    with pytest.raises(bx.SolveError, match="NaN"):
        bx.hypergradient(LOST["start"][0], -jnp.ones(3), THETA)
