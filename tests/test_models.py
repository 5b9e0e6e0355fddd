"""x and theta that are models: registered classes with settings, which can be called."""

import collections
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._problem import as_arrays, is_start_function

FEATURES = jax.random.normal(jax.random.key(0), (20, 2))
TARGETS = FEATURES @ jnp.array([1.0, -2.0]) + 0.3
THETA = jnp.array(-2.0)
MLP = eqx.nn.MLP(2, "scalar", 3, 1, activation=jnp.tanh, key=jax.random.key(1))
LINEAR = eqx.nn.Linear(2, "scalar", key=jax.random.key(1))


def squares(model):
    return sum(jnp.sum(a**2) for a in jtu.tree_leaves(eqx.filter(model, eqx.is_array)))


def inner(model, theta):
    errors = jax.vmap(model)(FEATURES) - TARGETS
    return jnp.mean(errors**2) + jnp.exp(theta) * squares(model)


def outer(model, theta):
    return jnp.mean((jax.vmap(model)(FEATURES) - 0.9 * TARGETS) ** 2)


def exact(theta):
    """The outer loss of the ridge regression that a linear model is."""
    z = jnp.concatenate([FEATURES, jnp.ones((20, 1))], 1)
    w = jnp.linalg.solve(z.T @ z / 20 + jnp.exp(theta) * jnp.eye(3), z.T @ TARGETS / 20)
    return jnp.mean((z @ w - 0.9 * TARGETS) ** 2)


def test_a_model_that_can_be_called_is_x():
    problem, want = bx.Bilevel(inner, outer), jax.grad(exact)(THETA)
    estimate, state = bx.hypergradient(problem, LINEAR, THETA)
    np.testing.assert_allclose(estimate.grad, want, rtol=1e-5)
    assert isinstance(estimate.x, eqx.nn.Linear) and isinstance(state.x, eqx.nn.Linear)
    again, _ = bx.hypergradient(problem, LINEAR, THETA, state=state)
    np.testing.assert_allclose(again.grad, want, rtol=1e-5)
    x_star = bx.argmin(inner)
    got = jax.grad(lambda theta: outer(x_star(LINEAR, theta), theta))(THETA)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert bx.check(problem, estimate.x, THETA, num_directions=1).ok
    solution = bx.solve(problem, LINEAR, THETA, num_steps=2)
    assert isinstance(solution.x, eqx.nn.Linear) and solution.history.value[-1] < exact(THETA)


def test_unrolled_steps_of_a_network():
    solver = bx.Descent(optax.sgd(0.05), num_steps=5)
    estimate, _ = bx.hypergradient(
        bx.Bilevel(inner, outer), MLP, THETA, inner_solver=solver, rule=bx.Unrolled()
    )
    arrays, static = eqx.partition(MLP, eqx.is_array)

    def by_hand(theta):
        model = arrays
        for _ in range(5):
            grad = jax.grad(lambda a: inner(eqx.combine(a, static), theta))(model)
            model = jtu.tree_map(lambda a, b: a - 0.05 * b, model, grad)
        return outer(eqx.combine(model, static), theta)

    assert isinstance(estimate.x, eqx.nn.MLP)
    np.testing.assert_allclose(estimate.grad, jax.grad(by_hand)(THETA), rtol=1e-10)


class Setting(eqx.Module):
    weight: jax.Array
    power: float = 2.0
    size: int = 3
    flag: bool = True
    nested: dict = eqx.field(default_factory=lambda: {"rate": 0.25})


class OnlySettings(eqx.Module):
    power: float = 2.0


Pair = collections.namedtuple("Pair", "a b")


def test_plain_numbers_of_classes_are_settings_and_others_are_variables():
    given = {
        "alone": 1.0,
        "list": [2.0, np.float64(3.0)],
        "pair": Pair(4.0, (5.0,)),
        "model": Setting(jnp.ones(2)),
        "dropout": eqx.nn.Dropout(0.25),
    }
    made = as_arrays(given)
    variables = (made["alone"], *made["list"], made["pair"].a, made["pair"].b[0])
    assert all(isinstance(leaf, jax.Array) for leaf in variables)
    model = made["model"]
    kept = (model.power, model.size, model.flag, model.nested["rate"], made["dropout"].p)
    assert kept == (2.0, 3, True, 0.25, 0.25)
    assert not any(isinstance(leaf, jax.Array) for leaf in kept)


def test_settings_stay_in_every_view():
    x0, theta = Setting(jnp.zeros(2)), Setting(jnp.array(0.0))

    def inner(x, theta):
        assert x.flag and theta.size == 3 and isinstance(theta.power, float)
        pull = jnp.sum((x.weight - 1.0) ** x.power)
        return pull + jnp.exp(theta.weight) * jnp.sum(x.weight**theta.power)

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum(x.weight**2))
    estimate, _ = bx.hypergradient(problem, x0, theta)  # x = 1 / (1 + e^theta)
    np.testing.assert_allclose(estimate.grad.weight, -0.5, rtol=1e-6)
    assert estimate.grad.power is None and estimate.x.power == 2.0
    solution = bx.solve(problem, x0, theta, num_steps=2)
    assert solution.theta.power == 2.0 and solution.x.nested == {"rate": 0.25}
    x = bx.argmin(inner)(x0, theta)
    assert x.power == 2.0 and bx.check(problem, x, theta, num_directions=1).ok


@pytest.mark.parametrize("name", ["x0", "theta"])
def test_a_class_with_settings_only_is_refused(name):
    points = {"x0": jnp.ones(2), "theta": jnp.ones(2), name: OnlySettings()}
    problem = bx.Bilevel(lambda x, theta: jnp.ones(()), lambda x, theta: jnp.ones(()))
    with pytest.raises(TypeError, match=rf"`{name}` has no variables: `{name}.power` is a plain"):
        bx.hypergradient(problem, points["x0"], points["theta"])


class Start:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, theta):
        return self.scale * theta

    method = __call__


class StartModule(eqx.Module):
    scale: jax.Array

    def from_theta(self, theta):
        return self.scale * theta


@pytest.mark.parametrize(
    ("x0", "is_function"),
    [
        (lambda theta: theta, True),
        (jnp.tanh, True),
        (jax.jit(lambda theta: theta), True),
        (functools.partial(jnp.add, 1.0), True),
        (jtu.Partial(jnp.add, jnp.ones(2)), True),
        (Start(2.0), True),
        (Start(2.0).method, True),
        (StartModule(jnp.ones(2)).from_theta, True),
        (eqx.nn.Lambda(jnp.tanh), True),
        (MLP, False),
        (LINEAR, False),
        (jnp.ones(2), False),
        ({"a": 1.0}, False),
        ([MLP, LINEAR], False),
    ],
)
def test_what_is_a_function_of_theta(x0, is_function):
    assert is_start_function(x0) == is_function


def test_integers_in_a_model_say_how_to_split_it():
    class Counter(eqx.Module):
        weight: jax.Array
        count: jax.Array

        def __call__(self, z):
            return self.weight @ z

    with pytest.raises(TypeError, match=r"`x0.count` must be floating point.*nnx.split"):
        bx.hypergradient(bx.Bilevel(inner, outer), Counter(jnp.ones(2), jnp.array(0)), THETA)


def test_a_model_that_was_split():
    """As `nnx.split` and `nnx.merge` do it: parameters are x, the rest is data."""

    class Normalised(eqx.Module):
        linear: eqx.nn.Linear
        count: jax.Array

        def __call__(self, z):
            return self.linear(z) + 0.0 * self.count

    params, rest = eqx.partition(Normalised(LINEAR, jnp.array(3)), eqx.is_inexact_array)
    problem = bx.Bilevel(
        lambda x, theta, rest: inner(eqx.combine(x, rest).linear, theta),
        lambda x, theta, rest: outer(eqx.combine(x, rest).linear, theta),
        inner_data=rest,
        outer_data=rest,
    )
    estimate, _ = bx.hypergradient(problem, params, THETA)
    np.testing.assert_allclose(estimate.grad, jax.grad(exact)(THETA), rtol=1e-5)


@pytest.mark.parametrize("name", ["x0", "theta"])
def test_complex_variables_say_how_to_split_them(name):
    points = {"x0": jnp.ones(2), "theta": jnp.ones(2), name: jnp.ones(2, complex)}
    problem = bx.Bilevel(lambda x, t: jnp.sum(jnp.abs(x - t)), lambda x, t: jnp.sum(jnp.abs(x)))
    calls = (
        lambda: bx.hypergradient(problem, points["x0"], points["theta"]),
        lambda: bx.argmin(problem.inner)(points["x0"], points["theta"]),
        lambda: bx.solve(problem, points["x0"], points["theta"], num_steps=1),
    )
    for call in calls:
        with pytest.raises(TypeError, match="real and imaginary parts") as error:
            call()
        assert f"`{name}`" in str(error.value)


def test_aux_may_hold_anything_and_a_callback_gets_it():
    aux = {"name": "run", "none": None, "fn": jnp.tanh, "share": 0.5, "count": 3}
    problem = bx.Bilevel(
        lambda x, theta: jnp.sum((x - theta) ** 2),
        lambda x, theta: (jnp.sum(x**2), aux | {"x": x}),
    )
    seen = []
    solution = bx.solve(
        problem, jnp.zeros(2), jnp.ones(2), num_steps=2, callback=lambda p: seen.append(p.aux)
    )
    for got in (*seen, solution.aux):
        assert got["name"] == "run" and got["none"] is None and got["fn"] is jnp.tanh
        assert got["share"] == 0.5 and got["count"] == 3 and got["x"].shape == (2,)
