"""Every rule as the adjoint of an Optimistix call."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import fixed_point, logistic, quadratic, relative_error, root

RULES = {
    "Implicit": (bx.Implicit(bx.linear.CG(rtol=1e-12)), 1e-7),
    "Unrolled": (bx.Unrolled(), 1e-6),
    "Truncated": (bx.Truncated(num_steps=150), 1e-5),
    "ForwardMode": (bx.ForwardMode(), 1e-6),
    "OneStep": (bx.OneStep(), 0.95),
    "KStep": (bx.KStep(num_steps=100), 1e-6),
    "JacobianFree": (bx.JacobianFree(), 0.95),
}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def check(oracle, solve, bound):
    def value(theta):
        return oracle.problem.outer_value(solve(theta), theta)[0]

    assert relative_error(jax.jit(jax.grad(value))(oracle.theta), oracle.hypergradient) < bound
    return value


BFGS, DESCENT = optx.BFGS(**TIGHT), optx.GradientDescent(0.15, **TIGHT)


@pytest.mark.parametrize(
    ("name", "solver"),
    # not ("Truncated", BFGS): refused, because its last steps are rejected trials. What does not
    # look at the steps meets one of the two.
    [(name, DESCENT) for name in ("Unrolled", "Truncated", "ForwardMode", "KStep")]
    + [(name, BFGS) for name in RULES if name != "Truncated"],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_minimise(name, solver):
    rule, bound = RULES[name]
    oracle = quadratic(condition=5.0)

    def solve(theta):
        return optx.minimise(
            lambda x, theta: oracle.problem.inner(x, theta),
            solver,
            oracle.x0,
            args=theta,
            adjoint=rule,
            max_steps=400,
        ).value

    value = check(oracle, solve, bound)
    if name == "Implicit":
        hessian = jax.jit(jax.hessian(value))(oracle.theta)
        assert relative_error(hessian, oracle.hyper_hessian) < 1e-6
        thetas = jnp.stack([oracle.theta, oracle.theta + 0.1])
        batched = jax.jit(jax.vmap(jax.grad(value)))(thetas)
        np.testing.assert_allclose(batched[1], jax.grad(value)(thetas[1]), rtol=1e-8)


def test_implicit_jvp_in_minimise():
    oracle = logistic()
    _, x_dot = jax.jvp(
        lambda theta: (
            optx.minimise(
                lambda x, theta: oracle.problem.inner(x, theta),
                optx.BFGS(**TIGHT),
                oracle.x0,
                args=theta,
                adjoint=RULES["Implicit"][0],
            ).value
        ),
        (oracle.theta,),
        (jnp.ones(6),),
    )
    assert relative_error(x_dot, oracle.jacobian @ np.ones(6)) < 1e-7


NEWTON, CHORD, DOGLEG = optx.Newton(**TIGHT), optx.Chord(**TIGHT), optx.Dogleg(**TIGHT)


@pytest.mark.parametrize(
    ("name", "solver", "bound"),
    [
        ("Implicit", NEWTON, 1e-4),
        ("Unrolled", NEWTON, 1e-6),
        ("Truncated", NEWTON, 1e-5),
        ("ForwardMode", DOGLEG, 1e-6),
        ("OneStep", NEWTON, 1e-8),  # one Newton step contracts at once
        ("OneStep", CHORD, 0.1),  # the Jacobian at x0 in place of that at x
        ("KStep", CHORD, 1e-8),
        ("OneStep", DOGLEG, 0.95),  # a measured step on the normal equations
        ("KStep", DOGLEG, 1e-2),
    ],
    ids=lambda p: p if isinstance(p, str) else None,
)
@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_root_find(name, solver, bound):
    rule = bx.Implicit() if name == "Implicit" else RULES[name][0]
    oracle = root()

    def solve(theta):
        return optx.root_find(
            lambda x, theta: oracle.problem.inner(x, theta),
            solver,
            oracle.x0,
            args=theta,
            adjoint=rule,
        ).value

    check(oracle, solve, bound)


ITERATION = optx.FixedPointIteration(**TIGHT)
DAMPED = optx.FixedPointIteration(**TIGHT, damp=0.3)


@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, ITERATION) for name in RULES] + [("KStep", DAMPED), ("KStep", NEWTON)],
    ids=lambda p: p if isinstance(p, str) else None,
)
@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_fixed_point(name, solver):
    rule, bound = RULES[name] if name != "Implicit" else (bx.Implicit(), 1e-4)
    oracle = fixed_point()

    def solve(theta):
        return optx.fixed_point(
            lambda x, theta: oracle.problem.inner(x, theta),
            solver,
            oracle.x0,
            args=theta,
            adjoint=rule,
        ).value

    check(oracle, solve, bound)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("Implicit", optx.LevenbergMarquardt(**TIGHT)),
        ("Unrolled", optx.LevenbergMarquardt(**TIGHT)),
        ("KStep", optx.LevenbergMarquardt(**TIGHT)),
        ("KStep", optx.GaussNewton(**TIGHT)),
        ("ForwardMode", optx.GaussNewton(**TIGHT)),
    ],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
def test_least_squares(name, solver):
    rule, bound = RULES[name]
    features = jnp.cos(jnp.arange(12.0)).reshape(6, 2)

    def residuals(x, theta):
        return jnp.concatenate([features @ x - jnp.sin(jnp.arange(6.0)), theta * x])

    def value(theta):
        x = optx.least_squares(
            residuals,
            solver,
            jnp.zeros(2),
            args=theta,
            adjoint=rule,
        ).value
        return jnp.sum(x**2)

    def exact(theta):
        matrix = features.T @ features + jnp.diag(theta**2)
        return jnp.sum(jnp.linalg.solve(matrix, features.T @ jnp.sin(jnp.arange(6.0))) ** 2)

    theta = jnp.array([0.5, 0.8])
    found, expected = (jax.jit(jax.grad(fn))(theta) for fn in (value, exact))
    assert relative_error(found, expected) < bound


def test_jacobian_free_refuses_an_equation():
    with pytest.raises(TypeError, match="bx.FixedPoint"):
        optx.root_find(
            lambda x, theta: x - theta,
            optx.Newton(**TIGHT),
            jnp.zeros(2),
            args=jnp.ones(2),
            adjoint=bx.JacobianFree(),
        )


def test_unrolled_needs_a_bound_on_the_steps():
    with pytest.raises(ValueError, match="max_steps"):
        optx.minimise(
            lambda x, t: jnp.sum((x - t) ** 2),
            optx.BFGS(**TIGHT),
            jnp.zeros(2),
            args=jnp.ones(2),
            max_steps=None,
            adjoint=bx.Unrolled(),
        )


def test_a_failed_adjoint_solve_is_an_error():
    rule = bx.Implicit(bx.linear.CG(rtol=1e-12, max_steps=1))
    oracle = quadratic(condition=100.0)

    def value(theta):
        x = optx.minimise(
            lambda x, theta: oracle.problem.inner(x, theta),
            optx.BFGS(**TIGHT),
            oracle.x0,
            args=theta,
            adjoint=rule,
        ).value
        return oracle.problem.outer_value(x, theta)[0]

    with pytest.raises(RuntimeError, match="adjoint system was not solved"):
        jax.block_until_ready(jax.grad(value)(oracle.theta))
