"""A truncation that chooses its length, and what it says about its accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import logistic, relative_error

ORACLE = logistic()


def truncated(solver, rtol=1e-3, x0=None, rule=None):
    rule = bx.Truncated("auto", rtol=rtol) if rule is None else rule
    return bx.hypergradient(
        ORACLE.problem,
        ORACLE.x0 if x0 is None else x0,
        ORACLE.theta,
        inner_solver=solver,
        rule=rule,
        throw=False,
    )[0]


def error(estimate):
    return float(jnp.linalg.norm(estimate.grad - jnp.asarray(ORACLE.hypergradient)))


@pytest.mark.parametrize("optimizer", [optax.sgd(1.0), optax.sgd(0.5, momentum=0.8)])
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-6])
def test_the_accuracy_is_that_asked_for_in_few_steps(optimizer, rtol):
    found = truncated(bx.Descent(optimizer, num_steps=1_000), rtol)
    assert bool(found.result == bx.RESULTS.successful)
    scale = np.linalg.norm(ORACLE.hypergradient)
    assert error(found) <= rtol * scale
    assert error(found) <= 3 * float(found.error_estimate) + 1e-12
    # the contraction is at worst 0.84 a step; a segment has 32
    assert int(found.stats["num_cross_products"]) < np.log(rtol) / np.log(0.84) + 3 * 32


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_too_few_steps_are_flagged(num_steps):
    found = truncated(bx.Descent(optax.sgd(1.0), num_steps=num_steps))
    assert bool(found.result != bx.RESULTS.successful)
    assert error(found) <= 3 * float(found.error_estimate)


def test_differentiated_steps_are_those_of_truncated():
    solver = bx.Descent(optax.sgd(1.0), num_steps=400)
    found = truncated(solver)
    num_back = int(found.stats["num_cross_products"])
    same = truncated(solver, rule=bx.Truncated(num_back))
    assert relative_error(found.grad, same.grad) < 1e-12
    assert relative_error(found.x, same.x) < 1e-14


def test_a_solver_that_stops_by_itself():
    solver = bx.Descent(optax.sgd(1.0), num_steps=1_000, rtol=1e-8)
    found = truncated(solver, 1e-5)
    assert int(found.stats["num_inner_steps"]) < 200
    assert bool(found.result == bx.RESULTS.successful)
    assert error(found) <= 1e-5 * np.linalg.norm(ORACLE.hypergradient)


def one_mode(x, theta):
    return 0.5 * (1.01 + theta) * x**2 - x


MODE = bx.Bilevel(one_mode, lambda x, theta: 0.5 * (x - 0.3) ** 2)
MODE_GRADIENT = jax.grad(lambda theta: 0.5 * (1 / (1.01 + theta) - 0.3) ** 2)(0.0)


@pytest.mark.parametrize(
    ("num_steps", "outcome"),
    [(30, "burn_in"), (100, "burn_in"), (300, "inaccurate"), (3_000, "successful")],
)
def test_the_curse_of_unrolling_is_reported(num_steps, outcome):
    # step 1.99 / L: x converges from the first step on, its derivative gets worse for 100
    found, _ = bx.hypergradient(
        MODE,
        jnp.array(5.0),
        jnp.array(0.0),
        inner_solver=bx.Descent(optax.sgd(1.99 / 1.01), num_steps=num_steps),
        rule=bx.Truncated("auto"),
        throw=False,
    )
    assert bool(found.result == getattr(bx.RESULTS, outcome))
    gap = abs(float(found.grad) - float(MODE_GRADIENT))
    assert (gap < 1e-3 * abs(float(MODE_GRADIENT))) == (outcome == "successful")
    assert gap <= 3 * float(found.error_estimate)


def test_a_step_of_one_over_the_curvature_has_no_burn_in():
    found, _ = bx.hypergradient(
        MODE,
        jnp.array(5.0),
        jnp.array(0.0),
        inner_solver=bx.Descent(optax.sgd(1 / 1.01), num_steps=10),
        rule=bx.Truncated("auto"),
    )
    assert relative_error(found.grad, MODE_GRADIENT) < 1e-12


def test_in_an_optimistix_call():
    def value(theta):
        x = optx.minimise(
            lambda x, theta: ORACLE.problem.inner(x, theta),
            optx.GradientDescent(1.0, 1e-12, 1e-12),
            ORACLE.x0,
            args=theta,
            max_steps=1_000,
            adjoint=bx.Truncated("auto", rtol=1e-5),
        ).value
        return ORACLE.problem.outer_value(x, theta)[0]

    assert relative_error(jax.grad(value)(ORACLE.theta), ORACLE.hypergradient) < 1e-5


def test_one_program_for_every_theta():
    solver = bx.Descent(optax.sgd(1.0), num_steps=200)

    @jax.jit
    def grad(theta):
        rule = bx.Truncated("auto")
        found, _ = bx.hypergradient(
            ORACLE.problem, ORACLE.x0, theta, inner_solver=solver, rule=rule, throw=False
        )
        return found.grad

    thetas = jnp.stack([ORACLE.theta, ORACLE.theta + 0.3])
    batched = jax.vmap(grad)(thetas)
    np.testing.assert_allclose(batched[1], grad(thetas[1]), rtol=1e-3)


def test_misuse():
    with pytest.raises(ValueError, match="'auto'"):
        bx.Truncated("all")
    with pytest.raises(ValueError, match="rtol"):
        bx.Truncated("auto", rtol=-1.0)
    with pytest.raises(TypeError, match="rejected trials"):
        truncated(optx.BFGS(1e-9, 1e-9))
