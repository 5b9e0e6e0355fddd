"""What runs on the host refuses to be transformed, and says what to do instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


def inner(x, theta):
    return jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2)


def outer(x, theta):
    return jnp.sum((x - 0.4) ** 2)


PROBLEM = bx.Bilevel(inner, outer)
X0, THETA = jnp.zeros(2), jnp.zeros(2)
ENTRIES = {
    "solve": lambda problem, x, theta: bx.solve(problem, x, theta, num_steps=2).value,
    "check": lambda problem, x, theta: bx.check(problem, x, theta, verbose=False).condition_number,
    "compare": lambda problem, x, theta: bx.compare(problem, x, theta, verbose=False),
    "recommend": lambda problem, x, theta: bx.recommend(problem, x, theta).rule,
}


def scaled(scale):
    return bx.Bilevel(lambda x, theta: scale * inner(x, theta), outer)


def with_data(data):
    return bx.Bilevel(lambda x, t, d: inner(x, t) + jnp.sum(d), outer, inner_data=data)


WAYS = {
    "jit": lambda call: jax.jit(lambda t: call(PROBLEM, X0, t))(THETA),
    "vmap": lambda call: jax.vmap(lambda t: call(PROBLEM, X0, t))(THETA[:, None]),
    "vmap of x0": lambda call: jax.vmap(lambda x: call(PROBLEM, x, THETA))(X0[:, None]),
    "grad": lambda call: jax.grad(lambda t: call(PROBLEM, X0, t))(THETA),
    "jvp": lambda call: jax.jvp(lambda t: call(PROBLEM, X0, t), (THETA,), (THETA,)),
    "scan": lambda call: jax.lax.scan(lambda t, _: (call(PROBLEM, X0, t), None), THETA, None, 2),
    "of a constant": lambda call: jax.jit(lambda: call(PROBLEM, X0, THETA))(),
    "of data": lambda call: jax.grad(lambda d: call(with_data(d), X0, THETA))(X0),
    "of a closure": lambda call: jax.vmap(lambda s: call(scaled(s), X0, THETA))(jnp.ones(2)),
    "of a start": lambda call: jax.vmap(lambda s: call(PROBLEM, lambda t: s * t, THETA))(X0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ENTRIES)
def test_transformations_are_refused(name, way):
    message = rf"bx\.{name} runs on the host and cannot be called inside jit, vmap, grad"
    with pytest.raises(TypeError, match=message) as caught:
        WAYS[way](ENTRIES[name])
    assert "outside" in str(caught.value) or "bx.hypergradient(" in str(caught.value)


def test_settings_may_not_be_traced_either():
    def method(rate):
        return bx.DoubleLoop(optimizer=optax.sgd(rate))

    with pytest.raises(TypeError, match=r"`method` is traced, or closes over a value that is"):
        jax.vmap(lambda r: bx.solve(PROBLEM, X0, THETA, method(r)).value)(jnp.ones(2))
    with pytest.raises(TypeError, match=r"`tolerances` is traced"):
        jax.vmap(lambda r: bx.solve(PROBLEM, X0, THETA, rtol=r).value)(jnp.ones(2))


def test_constants_inside_grad_are_no_matter():
    def value(a):
        return a * bx.solve(PROBLEM, X0, THETA, num_steps=2).value

    found = jax.grad(value)(1.0)
    np.testing.assert_allclose(found, bx.solve(PROBLEM, X0, THETA, num_steps=2).value)


def test_the_derivative_of_the_theta_that_is_found():
    """What the message advises: `theta*(c) = log(1/c - 1)` from `x* = 1/(1 + exp(theta)) = c`."""
    x_star = bx.argmin(inner)

    def value(theta, c):
        return jnp.sum((x_star(X0, theta) - c) ** 2)

    c = jnp.array([0.4, 0.3])
    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - c) ** 2))
    method = bx.DoubleLoop(bx.NewtonCG(rtol=1e-12), optimizer=bx.OuterLBFGS())
    found = bx.solve(problem, X0, THETA, method, num_steps=20)
    np.testing.assert_allclose(found.theta, jnp.log(1 / c - 1), rtol=1e-6)
    jacobian = jax.jacobian(lambda c: bx.argmin(value, bx.Given())(found.theta, c))(c)
    np.testing.assert_allclose(jacobian, jnp.diag(-1 / (c * (1 - c))), rtol=1e-4, atol=1e-6)
