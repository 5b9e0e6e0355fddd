"""The door: what is accepted, what is refused, and what the refusal says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx


def quadratic(x, theta):
    return 0.5 * jnp.sum((x - theta) ** 2)


def outer(x, theta):
    return jnp.sum(x**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bx.Bilevel(lambda x: x, outer), "`inner` must accept (x, theta)"),
        (lambda: bx.Bilevel(quadratic, outer, inner_data=1.0), "(x, theta, data)"),
        (lambda: bx.Bilevel(quadratic, lambda x, theta, data: x), "no `outer_data` was given"),
        (lambda: bx.Bilevel(3.0, outer), "must be a function"),
        (lambda: bx.Bilevel(quadratic, None), "`outer` must be a function"),
    ],
)
def test_wrong_signatures_are_refused_at_construction(make, message):
    with pytest.raises(TypeError, match=r"(?s)") as error:
        make()
    assert message in str(error.value)


def test_data_given_twice_are_refused():
    with pytest.raises(ValueError, match="given twice"):
        bx.Bilevel(bx.Minimum(lambda x, t, d: x, data=1.0), outer, inner_data=2.0)


@pytest.mark.parametrize(
    ("inner", "outer", "x0", "theta", "message"),
    [
        (lambda x, t: x - t, outer, jnp.ones(3), jnp.ones(3), "`inner` must return a floating"),
        (quadratic, lambda x, t: x, jnp.ones(3), jnp.ones(3), "or (scalar, aux)"),
        (quadratic, lambda x, t: jnp.sum(x) > 0, jnp.ones(3), jnp.ones(3), "bool"),
        (quadratic, outer, jnp.ones(3), jnp.ones(3, int), "must be floating point"),
        (quadratic, outer, jnp.ones(3), 2, "`theta` must be floating point"),
        (quadratic, outer, {"a": jnp.ones(3, int)}, 1.0, "`x0['a']` must be floating point"),
        (quadratic, outer, jnp.ones(3, complex), 1.0, "complex"),
        (quadratic, outer, (jnp.ones(3), jnp.ones(3, jnp.float32)), 1.0, "float32, float64"),
        (bx.Root(lambda x, t: (x, x)), outer, jnp.ones(3), 1.0, "structure and shapes of x"),
        (bx.FixedPoint(lambda x, t: x[:2]), outer, jnp.ones(3), 1.0, "structure and shapes of x"),
    ],
)
def test_wrong_values_are_refused_before_compiling(inner, outer, x0, theta, message):
    with pytest.raises(TypeError) as error:
        bx.hypergradient(bx.Bilevel(inner, outer), x0, theta)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (optax.sgd(0.1), "bx.Descent(optimizer, num_steps=...)"),
        (lambda x, t: x, "bx.Traceable(fn)"),
        ("newton", "bx.NewtonCG()"),
        (optx.FixedPointIteration(1e-6, 1e-6), "solves fixed points"),
    ],
)
def test_unfit_inner_solvers_say_what_to_write(solver, message):
    with pytest.raises(TypeError) as error:
        bx.hypergradient(
            bx.Bilevel(quadratic, outer), jnp.ones(2), jnp.ones(2), inner_solver=solver
        )
    assert message in str(error.value)


def test_unfit_rules_and_methods_say_what_to_write():
    problem = bx.Bilevel(quadratic, outer)
    with pytest.raises(TypeError, match=r"bx.DoubleLoop\(optimizer=...\)"):
        bx.hypergradient(problem, jnp.ones(2), jnp.ones(2), rule=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"bx.DoubleLoop\(optimizer=...\)"):
        bx.solve(problem, jnp.ones(2), jnp.ones(2), optax.sgd(0.1))
    with pytest.raises(TypeError, match="must be a bx.Bilevel"):
        bx.solve(quadratic, jnp.ones(2), jnp.ones(2))
    with pytest.raises(TypeError, match="optx.BFGS"):
        bx.DoubleLoop(optimizer="adam")
    with pytest.raises(TypeError, match="has none that JAX can see"):
        bx.hypergradient(
            problem, jnp.ones(2), jnp.ones(2), inner_solver=bx.Given(), rule=bx.Unrolled()
        )
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least 1"):
        bx.Unrolled(num_steps=0)
    with pytest.raises(ValueError, match="'sqrt'"):
        bx.Unrolled(checkpoints="log")
    with pytest.raises(TypeError, match="bx.FixedPoint"):
        root = bx.Bilevel(bx.Root(lambda x, t: x - t), outer)
        bx.hypergradient(root, jnp.ones(2), jnp.ones(2), rule=bx.JacobianFree())


def test_none_and_other_leaves_survive():
    def inner(x, theta):
        assert x["name"] == "ridge" and theta["kind"] is abs
        return 0.5 * jnp.sum((x["w"] - theta["t"]) ** 2) + 0.5 * jnp.sum(x["w"] ** 2)

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum(x["w"] ** 2))
    x0 = {"w": jnp.zeros(2), "name": "ridge", "bias": None}
    theta = {"t": jnp.array([1.0, 2.0]), "kind": abs, "off": None}
    estimate, state = bx.hypergradient(problem, x0, theta)
    assert estimate.x["name"] == "ridge" and estimate.x["bias"] is None
    assert estimate.grad["kind"] is None
    np.testing.assert_allclose(estimate.grad["t"], theta["t"] / 2, rtol=1e-10)
    again, _ = bx.hypergradient(problem, x0, theta, state=state)
    np.testing.assert_allclose(again.grad["t"], estimate.grad["t"], rtol=1e-10)
    solution = bx.solve(problem, x0, theta, num_steps=2)
    assert solution.theta["kind"] is abs and solution.theta["off"] is None
    assert solution.x["name"] == "ridge"


def test_python_and_numpy_numbers_are_arrays():
    problem = bx.Bilevel(
        lambda x, t, data: 0.5 * (x - data * t) ** 2,
        lambda x, t, data: x * jnp.sum(data),
        inner_data=2.0,
        outer_data=np.ones(3),
    )
    estimate, _ = bx.hypergradient(problem, 0.0, 1.5)
    assert float(estimate.grad) == pytest.approx(6.0)
    assert isinstance(problem.inner_data, jax.Array)
    assert isinstance(problem.outer_data, jax.Array)


def test_empty_theta_and_empty_x_are_allowed():
    estimate, _ = bx.hypergradient(bx.Bilevel(lambda x, t: jnp.sum(x**2), outer), jnp.ones(2), {})
    assert estimate.grad == {}
    problem = bx.Bilevel(lambda x, t: jnp.sum(t**2), lambda x, t: jnp.sum(t**2))
    for inner_solver in (None, bx.LBFGS(), bx.Descent(optax.sgd(0.1), num_steps=2)):
        estimate, _ = bx.hypergradient(problem, {}, jnp.ones(2), inner_solver=inner_solver)
        np.testing.assert_allclose(estimate.grad, 2 * jnp.ones(2))


def test_a_state_from_another_call_is_refused():
    problem = bx.Bilevel(quadratic, outer)
    _, state = bx.hypergradient(problem, jnp.ones(2), jnp.ones(2))
    solver = bx.Descent(optax.sgd(0.1), num_steps=5)
    with pytest.raises(ValueError, match="`state` does not fit"):
        bx.hypergradient(
            problem, jnp.ones(2), jnp.ones(2), inner_solver=solver, rule=bx.Unrolled(), state=state
        )
