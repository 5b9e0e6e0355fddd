"""Solution maps whose options are arrays, and batches with an element that fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

SCALES = jnp.linspace(1.0, 30.0, 12)


def inner(x, theta):
    return 0.5 * jnp.sum(SCALES * (x - 1.0) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def solution(theta):
    return SCALES / (SCALES + jnp.exp(theta))


def loss(x):
    return jnp.sum((x - 0.4) ** 2)


X0, THETA = jnp.zeros(12), jnp.linspace(-0.5, 0.5, 12)


def preconditioner(x, theta):
    return lambda r: r / (SCALES + jnp.exp(theta))


RULES = {
    "tolerance": lambda a: (bx.NewtonCG(), bx.Implicit(bx.linear.CG(rtol=a))),
    "preconditioner": lambda a: (
        bx.NewtonCG(),
        bx.Implicit(bx.linear.CG(rtol=a), preconditioner=preconditioner),
    ),
    "quasi_newton": lambda a: (
        bx.LBFGS(rtol=a),
        bx.Implicit(bx.linear.CG(rtol=a), preconditioner=bx.precondition.QuasiNewton()),
    ),
    "inner_tolerance": lambda a: (bx.NewtonCG(rtol=a), None),
    "step_size": lambda a: (bx.NewtonCG(), bx.KStep(400, 0.03 + a)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("is_traced", [False, True])
def test_option_may_be_an_array(name, is_traced):
    def gradient(a):
        solver, rule = RULES[name](a)
        return jax.grad(lambda theta: loss(bx.argmin(inner, solver, rule)(X0, theta)))(THETA)

    gradient = jax.jit(gradient) if is_traced else gradient
    expected = jax.grad(lambda theta: loss(solution(theta)))(THETA)
    np.testing.assert_allclose(gradient(jnp.asarray(1e-9)), expected, rtol=1e-5, atol=1e-8)


def test_damping_may_be_an_array():
    damped = SCALES + jnp.exp(THETA) + 0.5
    x = solution(THETA)
    expected = -2 * (x - 0.4) / damped * jnp.exp(THETA) * x
    rule = bx.Implicit(bx.linear.CG(rtol=1e-10), damping=jnp.asarray(0.5))
    got = jax.grad(lambda theta: loss(bx.argmin(inner, rule=rule)(X0, theta)))(THETA)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_masked_element_that_failed_has_no_part_in_the_gradient():
    def one(x, theta):  # no minimum at theta < 0
        return jnp.sum(jnp.cosh(x) * theta - x)

    theta = jnp.array([1.0, -1.0, 2.0])
    solve = jax.vmap(bx.argmin(one, bx.NewtonCG(), throw=False), in_axes=(None, 0))

    def total(theta):
        x = solve(jnp.zeros(1), theta)
        return jnp.sum(jnp.where(jnp.isnan(x), 0.0, x))

    expected = jnp.array([-1 / jnp.sqrt(2.0), 0.0, -1 / (2 * jnp.sqrt(5.0))])
    np.testing.assert_allclose(jax.grad(total)(theta), expected, rtol=1e-6)
    assert np.isnan(solve(jnp.zeros(1), theta)[1]).all()


def test_element_that_failed_and_is_asked_for_is_flagged():
    solve = bx.argmin(lambda x, theta: theta * x**2 - x, bx.NewtonCG(), throw=False)
    gradient = jax.vmap(jax.grad(lambda theta: solve(jnp.asarray(0.0), theta)))
    got = gradient(jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(got[0], -0.5, rtol=1e-6)
    assert np.isnan(got[1])
