"""What a problem cannot have meant is said by name, and nothing that may have been meant."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx

X0 = jnp.zeros(3)
THETA = {"strength": jnp.array(0.0), "strenght": jnp.array(1.0)}
STEPS = bx.Descent(optax.sgd(0.1), num_steps=3)


def ridge(x, theta):
    return jnp.sum((x - 1.0) ** 2) + jnp.exp(theta["strength"]) * jnp.sum(x**2)


def outer(x, theta):
    return jnp.sum((x - 0.5) ** 2)


def said(problem, x0, theta, **options):
    """The warnings of one call of `hypergradient`; its second call says nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bx.hypergradient(problem, x0, theta, throw=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bx.hypergradient(problem, x0, theta, throw=False, **options)
    return [str(warning.message) for warning in caught]


def test_a_leaf_of_theta_that_reaches_nothing():
    problem = bx.Bilevel(ridge, outer)
    (text,) = said(problem, X0, THETA)
    assert "in `theta['strenght']` is exactly zero" in text and "bx.Unrolled()" not in text
    with pytest.warns(UserWarning, match=r"`theta\['strenght'\]` is exactly zero"):
        bx.solve(problem, X0, THETA, num_steps=1)


def test_an_additive_term_does_not_move_x():
    problem = bx.Bilevel(lambda x, theta: jnp.sum(x**2) + jnp.sum(theta**2), outer)
    (text,) = said(problem, X0, jnp.ones(2))
    assert "in `theta` is exactly zero" in text and "x0=lambda theta" in text


def test_theta_that_is_only_the_start():
    free = bx.Bilevel(lambda x, theta: jnp.sum((x - 1.0) ** 2), outer)
    theta = jnp.ones(3)
    (text,) = said(free, theta, theta, inner_solver=STEPS, rule=bx.Unrolled())
    assert "x0=lambda theta" in text
    start = lambda theta: 2.0 * theta
    (text,) = said(free, start, theta)
    assert "it enters x0 only" in text and "bx.Unrolled()" in text
    assert said(free, start, theta, inner_solver=STEPS, rule=bx.Unrolled()) == []


def test_an_outer_objective_without_x():
    (text,) = said(bx.Bilevel(ridge, lambda x, theta: theta["strength"] ** 2), X0, THETA | {})[:1]
    assert "The outer objective does not depend on x" in text


FINE = {
    "zero by value": (lambda x, theta: jnp.sum((x - 0.0 * theta) ** 2), outer),
    "direct only": (lambda x, theta: jnp.sum(x**2), lambda x, theta: outer(x, 0) + theta**2),
    "inside a call": (jax.jit(lambda x, theta: jnp.sum((x - theta) ** 2)), jax.jit(outer)),
    "inside a loop": (
        lambda x, theta: jnp.sum(x**2 + jax.lax.fori_loop(0, 3, lambda _, a: a * theta, x)),
        outer,
    ),
    "behind a comparison": (
        lambda x, theta: jnp.sum((x - jnp.where(theta > 0, 1.0, 0.0)) ** 2),
        outer,
    ),
    "aux": (
        lambda x, theta: jnp.sum((x - theta) ** 2),
        lambda x, theta: (outer(x, theta), {"theta": theta}),
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_right_programs_are_left_alone(name):
    assert said(bx.Bilevel(*FINE[name]), X0, jnp.array(0.5)) == []


def test_theta_in_the_optimiser_is_no_mistake():
    free = bx.Bilevel(lambda x, theta: jnp.sum((x - 1.0) ** 2), outer)
    steps = bx.Descent(lambda theta: optax.sgd(jnp.exp(theta)), num_steps=3)
    assert said(free, X0, jnp.array(-2.0), inner_solver=steps, rule=bx.Unrolled()) == []


def test_a_column_that_meets_a_row():
    with jax.numpy_rank_promotion("allow"):
        pull = lambda x, theta: jnp.sum((x - theta) ** 2)
        column, row = jnp.zeros((4, 1)), jnp.ones(4)
        (text,) = said(bx.Bilevel(pull, lambda x, theta: jnp.sum(x**2)), column, row)
        assert "`x0` of shape (4, 1) meets an array of shape (4,)" in text and "reshape" in text
        (text,) = said(bx.Bilevel(pull, lambda x, theta: jnp.sum(x**2)), row, column)
        assert "`theta` of shape (4, 1) meets" in text
        distances = lambda x, theta: jnp.sum((x - x.T - theta) ** 2) + jnp.sum(x**2)
        assert said(bx.Bilevel(distances, lambda x, t: jnp.sum(x**2)), column, row[:1]) == []
        assert said(bx.Bilevel(pull, lambda x, t: jnp.sum(x**2)), column, column + 1.0) == []
