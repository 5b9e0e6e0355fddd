"""SGD with momentum run backwards, against stored carries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._loop._reversible import repeat_reversibly, there_and_back
from bilevax.testing import logistic, relative_error

ORACLE = logistic()
THETA = {"lr": jnp.asarray(0.2), "momentum": jnp.asarray(0.9), "t": ORACLE.theta}


def inner(x, theta):
    return ORACLE.problem.inner(x, theta["t"])


def outer(x, theta):
    return jnp.sum(jnp.sin(x) * jnp.arange(1.0, 1 + x.size)) + theta["lr"]


def start(theta):
    return ORACLE.x0 + 0.1 * jnp.sum(theta["t"])


def learned(theta):
    rate = optax.exponential_decay(theta["lr"], 1_000, 0.9)
    return optax.sgd(rate, momentum=theta["momentum"])


def estimate(num_steps, checkpoints, optimiser=learned, theta=THETA, x0=start):
    return bx.hypergradient(
        bx.Bilevel(inner, outer),
        x0,
        theta,
        inner_solver=bx.Descent(optimiser, num_steps=num_steps),
        rule=bx.Unrolled(checkpoints=checkpoints),
        throw=False,
    )[0]


@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_the_derivative_is_that_of_stored_carries(num_steps):
    expected = estimate(num_steps, "sqrt")
    ours = estimate(num_steps, "reversible")
    assert ours.result == bx.RESULTS.successful
    assert relative_error(ours.grad, expected.grad) < 1e-12
    assert relative_error(ours.x, expected.x) < 1e-13


@pytest.mark.parametrize("momentum", [0.9, 0.8, 0.987654321])
def test_the_first_state_is_recovered_exactly_after_10_000_steps(momentum):
    solver = bx.Descent(optax.sgd(0.1, momentum=momentum), num_steps=10_000)
    condition = bx.Bilevel(inner, outer).inner
    carry = solver.start(condition, jnp.cos(jnp.arange(1.0 * ORACLE.x0.size)), THETA, None)

    @jax.jit
    def both(carry):
        return there_and_back(partial(solver.step, condition, THETA), carry, 10_000)

    first, recovered = both(carry)
    np.testing.assert_array_equal(first.x, recovered.x)
    np.testing.assert_array_equal(first.trace, recovered.trace)
    assert np.any(first.x != 0)


def test_long_loops_stay_right():
    # the adjoint has lost theta by then: an absolute comparison
    ours, expected = estimate(10_000, "reversible"), estimate(10_000, "sqrt")
    assert ours.result == bx.RESULTS.successful
    assert relative_error(ours.grad, expected.grad) < 1e-10


def test_memory_does_not_grow_as_stored_carries_do():
    size = 1_000
    problem = bx.Bilevel(lambda x, t: jnp.sum(jnp.cosh(x - t)), lambda x, t: jnp.sum(x**2))

    def carries(num_steps):
        def grad(theta):
            solver = bx.Descent(optax.sgd(1e-3, momentum=0.9), num_steps=num_steps)
            rule = bx.Unrolled(checkpoints="reversible")
            return bx.hypergradient(
                problem, jnp.ones(size), theta, inner_solver=solver, rule=rule, throw=False
            )[0].grad

        compiled = jax.jit(grad).lower(jnp.zeros(size)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (8 * size)

    few, many = carries(1_000), carries(10_000)
    assert few < 100
    # a word of lost bits in 100 steps, and a copy of them
    assert many - few < 2.5 * 9_000 / 100


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.chain(optax.trace(0.9), optax.clip(1e-3), optax.scale(-0.1)),
        lambda theta: optax.sgd(0.1, momentum=0.0 * theta["lr"]),  # loses everything
        lambda theta: optax.sgd(50.0 + theta["lr"], momentum=0.99),  # overflows
    ],
    ids=["nesterov", "clipped", "no momentum", "diverging"],
)
@pytest.mark.filterwarnings("ignore:The hypergradient in")  # theta is for other optimisers
def test_what_cannot_be_run_backwards_is_flagged(optimiser):
    assert estimate(300, "reversible", optimiser).result != bx.RESULTS.successful


@pytest.mark.parametrize("optimiser", [optax.adam(0.1), optax.sgd(0.1), optax.lbfgs()])
@pytest.mark.filterwarnings("ignore:The hypergradient in")
def test_another_optimiser_is_refused(optimiser):
    with pytest.raises(TypeError, match="momentum"):
        estimate(3, "reversible", optimiser)


def test_float32_and_pytrees():
    def split(x, theta):
        return inner(jnp.concatenate([x["a"], x["b"][None]]).astype(jnp.float64), theta)

    def loop(theta, reversible):
        x0 = {"a": jnp.ones(ORACLE.x0.size - 1, jnp.float32), "b": jnp.ones((), jnp.float32)}
        solver = bx.Descent(optax.sgd(0.1, momentum=0.9), num_steps=20)
        condition = bx.Minimum(split)
        carry = solver.start(condition, x0, theta, None)
        step = partial(solver.step, condition, theta)
        if reversible:
            x = repeat_reversibly(step, carry, 20)[0]
        else:
            x = jax.lax.fori_loop(0, 20, lambda _, c: step(c), carry)[0]
        return jnp.sum(jnp.sin(x["a"])) + x["b"]

    grad = jax.jit(jax.grad(loop), static_argnums=1)
    assert relative_error(grad(THETA, True)["t"], grad(THETA, False)["t"]) < 1e-5


def test_64_bit_integers_are_asked_for(user_settings):
    with pytest.raises(ValueError, match="jax_enable_x64"):
        repeat_reversibly(lambda c: c, (jnp.ones(2), optax.TraceState(jnp.ones(2))), 3)
