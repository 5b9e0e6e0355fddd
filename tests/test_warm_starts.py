"""Warm starts save products, the more the looser the tolerance, and change no result."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


def ridge_per_feature(num_samples=200, num_features=100, num_validation=150):
    """Gaussian features with scales from 1 to 10^-1.5, a linear truth and noise."""
    rng = np.random.default_rng(0)
    scales = np.logspace(0, -1.5, num_features)
    features = rng.normal(size=(num_samples + num_validation, num_features)) * scales
    targets = features @ rng.normal(size=num_features) + rng.normal(size=len(features))
    train = (features[:num_samples], targets[:num_samples])
    validation = (features[num_samples:], targets[num_samples:])

    def inner(x, theta, data):
        features, targets = data
        residual = features @ x - targets
        return 0.5 * jnp.sum(residual**2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

    def outer(x, theta, data):
        features, targets = data
        return 0.5 * jnp.mean((features @ x - targets) ** 2)

    return bx.Bilevel(inner, outer, train, validation)


@pytest.mark.parametrize(("rtol", "gain"), [(1e-2, 3.0), (1e-3, 2.0)])
def test_fifty_adam_steps_take_fewer_products(rtol, gain):
    problem = ridge_per_feature()

    def run(is_warm, rtol=rtol):
        method = bx.DoubleLoop(
            bx.NewtonCG(rtol=jnp.asarray(rtol)),
            bx.Implicit(bx.linear.CG(rtol=jnp.asarray(rtol))),
            optax.adam(0.1),
            start="warm" if is_warm else "cold",
            warm_start_adjoint=is_warm,
        )
        return bx.solve(problem, jnp.zeros(100), jnp.zeros(100), method, num_steps=50)

    warm, cold, exact = run(True), run(False), run(True, 1e-9)
    assert warm.stats["num_flagged"] == cold.stats["num_flagged"] == 0
    products = [s.stats["num_hessian_products"] for s in (cold, warm)]
    assert products[0] >= gain * products[1]

    # the result of exact steps, to the accuracy that was asked for, of both systems, once x is
    # solved for exactly
    def exact_value(theta):
        tight = bx.NewtonCG(rtol=1e-10)
        return float(bx.hypergradient(problem, jnp.zeros(100), theta, inner_solver=tight)[0].value)

    for found in (warm, cold):
        assert exact_value(found.theta) == pytest.approx(exact_value(exact.theta), rel=2 * rtol)
