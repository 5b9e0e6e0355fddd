"""Nothing that is traced outlives its trace: the views under `jax.checking_leaks()`.

A derivative rule that closes over a traced value works until it is used inside somebody
else's `scan` or `vmap`.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx


@pytest.fixture(autouse=True)
def small_heap():
    """JAX collects garbage at the end of every trace: not again what was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


THETA, X0 = jnp.array([0.1, -0.2, 0.3]), jnp.zeros(3)


def inner(x, theta):
    return 0.5 * jnp.sum(jnp.exp(theta) * x**2) - jnp.sum(x)


PROBLEM = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 0.3) ** 2) + 0.1 * jnp.sum(theta**2))
STEPS = bx.Descent(optax.sgd(0.3), 60)
CASES = {
    "Implicit": (bx.Implicit(), None),
    "Implicit, options as arrays": (
        bx.Implicit(bx.linear.CG(rtol=jnp.asarray(1e-9)), damping=jnp.asarray(1e-12)),
        bx.LBFGS(rtol=jnp.asarray(1e-9)),
    ),
    "MinimumNorm": (bx.MinimumNorm(), None),
    "Unrolled": (bx.Unrolled(), STEPS),
    "Unrolled, until it stops": (bx.Unrolled(), optx.GradientDescent(0.3, 1e-9, 1e-9)),
    "Unrolled, few kept": (bx.Unrolled(checkpoints=3), STEPS),
    "Truncated": (bx.Truncated(50), STEPS),
    "Truncated, as many as matter": (bx.Truncated("auto"), STEPS),
    "KStep": (bx.KStep(50), STEPS),
    "ForwardMode": (bx.ForwardMode(), STEPS),
}


# Equinox 0.13.8 keeps one in its checkpointed loop, which this case is, on JAX 0.12.
KEPT_BY_EQUINOX = {"Unrolled, until it stops"} if jax.__version_info__ >= (0, 12) else set()


@pytest.mark.parametrize("name", sorted(CASES.keys() - KEPT_BY_EQUINOX))
def test_no_view_keeps_a_traced_value(name):
    rule, solver = CASES[name]

    def solution(theta, shift):
        x_star = bx.argmin(lambda x, theta: inner(x - shift, theta), solver, rule=rule)
        return jnp.sum(x_star(X0, theta))

    with jax.checking_leaks():
        estimate, _ = bx.hypergradient(PROBLEM, X0, THETA, rule=rule, inner_solver=solver)
        slopes = jax.grad(solution, (0, 1))(THETA, jnp.asarray(0.0))
    x = np.exp(-THETA)
    np.testing.assert_allclose(estimate.grad, -2 * (x - 0.3) * x + 0.2 * THETA, rtol=1e-3)
    np.testing.assert_allclose(slopes[0], -x, rtol=1e-3)
    np.testing.assert_allclose(slopes[1], 3.0, rtol=1e-3)


def test_a_run_keeps_no_traced_value():
    with jax.checking_leaks():
        solution = bx.solve(PROBLEM, X0, THETA, num_steps=2, progress=False)
    assert len(solution.history.value) == 3  # the start, too
