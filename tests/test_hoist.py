"""Functions made anew around traced values: compiled once, and never for another function."""

import jax
import jax.numpy as jnp
import pytest

import bilevax as bx
from bilevax._hypergradient._entry import _jitted_solution
from bilevax._hypergradient._hoist import Hoisted

X0 = jnp.zeros(3)


def _value(curvature):
    """Of x* = curvature * theta / (1 + curvature), in closed form."""

    def inner(x, theta):
        return jnp.sum(0.5 * x**2 + 0.5 * curvature * (x - theta) ** 2)

    return jnp.sum(bx.argmin(inner)(X0, 2.0) ** 2)


def test_a_closure_that_is_differentiated_compiles_once():
    slope = jax.grad(_value)
    slope(jnp.array(1.0))
    before = _jitted_solution.num_compilations()
    for c in (1.0, 3.0):
        exact = 3 * 2 * (2 * c / (1 + c)) * 2 / (1 + c) ** 2
        assert slope(jnp.array(c)) == pytest.approx(exact, rel=1e-8)
    assert _jitted_solution.num_compilations() == before
    # Forward mode, and second derivatives.
    value, moved = jax.jvp(_value, (jnp.array(3.0),), (jnp.array(1.0),))
    assert value == pytest.approx(3 * 1.5**2)
    assert moved == pytest.approx(3 * 2 * 1.5 * 2 / 16, rel=1e-8)
    second = jax.grad(slope)(jnp.array(1.0))
    assert second == pytest.approx(12 * (2 / 16 - 4 * 1 / 16), rel=1e-6)


def test_what_the_text_of_a_program_does_not_show_is_compared():
    """Constants, and derivative rules of one name."""

    def made(factor):
        @jax.custom_jvp
        def call(x):
            return x

        call.defjvp(lambda primals, tangents: (primals[0], factor * tangents[0]))
        return lambda x: jnp.sum(call(x))

    first, second = Hoisted(made(1.0), X0).program, Hoisted(made(2.0), X0).program
    assert first != second
    program = Hoisted(lambda x: jnp.sum(x * 2), X0).program
    assert program != Hoisted(lambda x: jnp.sum(x * 3), X0).program
    assert program != Hoisted(lambda x: jnp.sum(x * 2), jnp.zeros(2)).program
    same = [Hoisted(lambda x: jnp.sum(jax.nn.softplus(x)), X0).program for _ in range(2)]
    assert same[0] == same[1]
    assert hash(same[0]) == hash(same[1])


def test_equal_programs_with_other_numbers_have_other_answers():
    for numbers in ([1.0, 2.0, 4.0], [2.0, 4.0, 1.0]):
        weights = jnp.array(numbers)

        def value(curvature, weights=weights):
            def inner(x, theta):
                return jnp.sum(0.5 * weights * x**2 + 0.5 * curvature * (x - theta) ** 2)

            return bx.argmin(inner)(X0, 2.0)[0]

        c, w = 3.0, numbers[0]
        assert jax.grad(value)(jnp.array(c)) == pytest.approx(2 * w / (w + c) ** 2, rel=1e-8)
