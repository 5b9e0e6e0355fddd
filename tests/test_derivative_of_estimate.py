"""The derivative of an estimate itself is right, or it is refused with the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

DATA = jnp.array([1.0, -0.5])
X0, THETA = jnp.zeros(2), jnp.array([0.2, -0.4])


def inner(x, theta, data):
    return jnp.sum(jnp.cosh(x) + 0.5 * jnp.exp(theta) * x**2 - data * x)


def outer(x, theta):
    return jnp.sum((x - 0.3) ** 2) + 0.1 * jnp.sum(theta**2)


def exact_value(theta, data=DATA):
    x = jnp.zeros(2)
    for _ in range(8):  # Newton's method: to rounding after five
        x = x - (jnp.sinh(x) + jnp.exp(theta) * x - data) / (jnp.cosh(x) + jnp.exp(theta))
    return outer(x, theta)


def estimate_of(theta, data=DATA, x0=X0, **options):
    problem = bx.Bilevel(inner, outer, inner_data=data)
    return bx.hypergradient(problem, x0, theta, **options)[0]


GRADIENT = jax.jit(jax.grad(exact_value))(THETA)
HESSIAN, SENSITIVITY = jax.jit(jax.jacfwd(jax.grad(exact_value), (0, 1)))(THETA, DATA)
MODES = {"forward": jax.jacfwd, "reverse": jax.jacrev}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_implicit_estimate_has_its_derivatives(mode, start):
    problem = bx.Bilevel(inner, outer, inner_data=DATA)
    options = {}
    if start == "warm":
        options["state"] = bx.hypergradient(problem, X0, THETA)[1]

    def both(theta, data):
        estimate = estimate_of(theta, data, **options)
        return estimate.value, estimate.grad

    of_value, of_gradient = jax.jit(MODES[mode](both, argnums=(0, 1)))(THETA, DATA)
    np.testing.assert_allclose(of_value[0], GRADIENT, rtol=1e-6)
    np.testing.assert_allclose(of_gradient[0], HESSIAN, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(of_gradient[1], SENSITIVITY, rtol=1e-6, atol=1e-9)


def test_hessian_of_the_value():
    got = jax.hessian(lambda theta: estimate_of(theta).value)(THETA)
    np.testing.assert_allclose(got, HESSIAN, rtol=1e-6, atol=1e-8)


def test_derivative_with_damping_is_that_of_the_damped_number():
    def damped(theta):
        x = jnp.zeros(2)
        for _ in range(8):
            x = x - (jnp.sinh(x) + jnp.exp(theta) * x - DATA) / (jnp.cosh(x) + jnp.exp(theta))
        v = 2 * (x - 0.3) / (jnp.cosh(x) + jnp.exp(theta) + 0.5)
        return 0.2 * theta - v * jnp.exp(theta) * x

    rule = bx.Implicit(damping=0.5)
    got = jax.jit(jax.jacfwd(lambda theta: estimate_of(theta, rule=rule).grad))(THETA)
    np.testing.assert_allclose(got, jax.jit(jax.jacfwd(damped))(THETA), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_what_both_functions_close_over_is_differentiated(mode):
    def gradient(data):
        problem = bx.Bilevel(
            lambda x, theta: inner(x, theta, data), lambda x, theta: data[0] * outer(x, theta)
        )
        return bx.hypergradient(problem, X0, THETA)[0].grad

    expected = SENSITIVITY + jnp.stack([GRADIENT, jnp.zeros(2)], axis=1)
    found = jax.jit(MODES[mode](gradient))(DATA)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    if mode == "forward":
        batch = jax.jit(jax.vmap(gradient))(DATA[None])
        np.testing.assert_allclose(batch[0], GRADIENT, rtol=1e-6)


STEPS = bx.Descent(optax.sgd(0.3), num_steps=200)
MOMENTUM = bx.Descent(optax.sgd(0.3, momentum=0.1), num_steps=200)
OTHERS = {
    "KStep": (bx.KStep(20, 0.3), None),
    "OneStep": (bx.OneStep(0.3), None),
    "JacobianFree": (bx.JacobianFree(), None),
    "MinimumNorm": (bx.MinimumNorm(), None),
    "Truncated": (bx.Truncated(50), STEPS),
    "Unrolled": (bx.Unrolled(), STEPS),
    "Unrolled_all": (bx.Unrolled(checkpoints="all"), STEPS),
    "Unrolled_few": (bx.Unrolled(checkpoints=5), STEPS),
    "Unrolled_reversible": (bx.Unrolled(checkpoints="reversible"), MOMENTUM),
    "Unrolled_Newton": (bx.Unrolled(), bx.NewtonCG()),
    "ForwardMode": (bx.ForwardMode(), STEPS),
    "Implicit_CG": (bx.Implicit(bx.linear.CG(rtol=1e-10)), None),
    "Implicit_inexact": (bx.Implicit(inexact=True), None),
}


REFUSES_BOTH = {
    *("KStep", "OneStep", "JacobianFree", "MinimumNorm", "Truncated"),
    *("Unrolled_reversible", "Unrolled_Newton"),
}
REFUSES_REVERSE = {"ForwardMode", "Unrolled_few"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_every_rule_is_right_or_refuses(name, mode):
    rule, solver = OTHERS[name]

    def both(theta):
        estimate = estimate_of(theta, rule=rule, inner_solver=solver)
        return estimate.value, estimate.grad

    if name in REFUSES_BOTH or (mode == "reverse" and name in REFUSES_REVERSE):
        with pytest.raises((TypeError, RuntimeError), match=r"bx\.Implicit\(\)(.|\n)*bx\.argmin"):
            MODES[mode](both)(THETA)
        return
    value, hessian = jax.jit(MODES[mode](both))(THETA)  # one program
    np.testing.assert_allclose(value, GRADIENT, rtol=1e-5)
    np.testing.assert_allclose(hessian, HESSIAN, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_several_objectives_refuse(mode):
    problem = bx.Bilevel(inner, lambda x, theta: jnp.stack([outer(x, theta)]), inner_data=DATA)
    with pytest.raises(TypeError, match=r"bx\.hypergradient of each"):
        MODES[mode](lambda theta: bx.hypergradients(problem, X0, theta).grad)(THETA)
