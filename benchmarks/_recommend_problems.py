"""Eighteen problems, as different as they come, for the benchmark of `bx.recommend`."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx

import bilevax as bx


class Case(NamedTuple):
    """A problem, how its inner part is solved, and where the truth comes from."""

    name: str
    problem: bx.Bilevel
    x0: Any
    theta: Any
    inner_solver: Any
    truth: Any  # a rule
    truth_solver: Any

    @property
    def size(self) -> int:
        x = self.x0(self.theta) if callable(self.x0) else self.x0
        return sum(a.size for a in jax.tree.leaves(x))

    @property
    def num_outer(self) -> int:
        return sum(a.size for a in jax.tree.leaves(self.theta))


def all_cases(quick: bool) -> Iterator[Case]:
    """One after the other, so that only one is in memory."""
    shrink = 10 if quick else 1
    makers: list[Callable[[int], Case]] = [
        small_ridge,
        per_feature,
        large_logistic,
        one_strength,
        sample_weights,
        ill_conditioned,
        well_conditioned,
        badly_scaled,
        least_squares,
        converged_descent,
        stopped_early,
        learned_step_size,
        learned_start,
        network_with_adam,
        strong_fixed_point,
        weak_fixed_point,
        root,
        singular,
    ]
    for make in makers[:: 10 if quick else 1]:
        yield make(shrink)


def _normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _solved(name: str, problem: bx.Bilevel, x0: Any, theta: Any, solver: Any = None) -> Case:
    """The truth is that of the exact inner solution."""
    tight = bx.NewtonCG(rtol=1e-10)
    truth = bx.Implicit(bx.linear.CG(rtol=1e-10))
    return Case(name, problem, x0, theta, solver, truth, tight)


def _run(name: str, problem: bx.Bilevel, x0: Any, theta: Any, solver: Any) -> Case:
    """The truth is the derivative of the steps."""
    return Case(name, problem, x0, theta, solver, bx.Unrolled(), solver)


def _mean_loss(x: Any, features: Any, labels: Any) -> Any:
    return jnp.mean(jax.nn.softplus(-labels * (features @ x)))


def _logistic(n: int, d: int, strength: float = 1e-2, scale: Any = None) -> bx.Bilevel:
    """An l2 strength for each feature (or one for all)."""
    features, w = _normal(2 * n, d) / d**0.5, _normal(d, seed=1)
    labels = jnp.sign(features @ w + 0.3 * _normal(2 * n, seed=2))
    features = features if scale is None else features * scale[None, :]

    def inner(x: Any, theta: Any, data: Any) -> Any:
        return _mean_loss(x, *data) + 0.5 * strength * jnp.sum(jnp.exp(theta) * x**2)

    def outer(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return _mean_loss(x, *data)

    return bx.Bilevel(inner, outer, (features[:n], labels[:n]), (features[n:], labels[n:]))


def small_ridge(shrink: int) -> Case:
    features, targets = _normal(200 // shrink, 20), _normal(200 // shrink, seed=1)

    def inner(x: Any, theta: Any, data: Any) -> Any:
        return jnp.mean((data[0] @ x - data[1]) ** 2) + jnp.sum(jnp.exp(theta) * x**2)

    def outer(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return jnp.mean((data[0] @ x - data[1]) ** 2)

    half = len(targets) // 2
    problem = bx.Bilevel(
        inner, outer, (features[:half], targets[:half]), (features[half:], targets[half:])
    )
    return _solved("ridge, 20 strengths", problem, jnp.zeros(20), -jnp.ones(20))


def per_feature(shrink: int) -> Case:
    d = 200 // shrink
    problem = _logistic(2000 // shrink, d)
    return _solved("logistic, 200 strengths", problem, jnp.zeros(d), jnp.zeros(d))


def large_logistic(shrink: int) -> Case:
    d = 1000 // shrink
    problem = _logistic(10_000 // shrink, d, 1e-3)
    return _solved("logistic, 10,000 x 1,000", problem, jnp.zeros(d), jnp.zeros(d))


def one_strength(shrink: int) -> Case:
    d = 300 // shrink
    problem = _logistic(3000 // shrink, d)
    return _solved("logistic, one strength", problem, jnp.zeros(d), jnp.zeros(()))


def sample_weights(shrink: int) -> Case:
    n, d = 4000 // shrink, 100 // shrink
    features, w = _normal(2 * n, d), _normal(d, seed=1)
    labels = jnp.sign(features @ w + _normal(2 * n, seed=2))

    def inner(x: Any, theta: Any, data: Any) -> Any:
        losses = jax.nn.softplus(-data[1] * (data[0] @ x))
        return jnp.mean(jax.nn.sigmoid(theta) * losses) + 1e-2 * jnp.sum(x**2)

    def outer(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return _mean_loss(x, *data)

    problem = bx.Bilevel(inner, outer, (features[:n], labels[:n]), (features[n:], labels[n:]))
    return _solved("4,000 sample weights", problem, jnp.zeros(d), jnp.zeros(n))


def ill_conditioned(shrink: int) -> Case:
    d = 400 // shrink
    rotation = jnp.linalg.qr(_normal(d, d))[0]
    matrix = rotation @ jnp.diag(jnp.logspace(-5, 0, d)) @ rotation.T

    def inner(x: Any, theta: Any, data: Any) -> Any:
        return 0.5 * x @ data @ x - theta @ x

    def outer(x: Any, theta: Any) -> Any:
        del theta
        return jnp.mean((x - 1.0) ** 2)

    problem = bx.Bilevel(inner, outer, inner_data=matrix)
    return _solved("quadratic, condition 1e5", problem, jnp.zeros(d), matrix @ _normal(d, seed=3))


def well_conditioned(shrink: int) -> Case:
    d = 100_000 // shrink

    def inner(x: Any, theta: Any, data: Any) -> Any:
        return jnp.sum(0.5 * (1 + jax.nn.sigmoid(theta)) * x**2 - data * x + 0.1 * jnp.cos(x))

    def outer(x: Any, theta: Any) -> Any:
        del theta
        return jnp.mean((x - 1.0) ** 2)

    problem = bx.Bilevel(inner, outer, inner_data=_normal(d))
    return _solved("100,000 variables, condition 2", problem, jnp.zeros(d), _normal(d, seed=1))


def badly_scaled(shrink: int) -> Case:
    d = 300 // shrink
    problem = _logistic(3000 // shrink, d, 1e-3, jnp.logspace(-2, 1, d))
    return _solved("logistic, badly scaled", problem, jnp.zeros(d), jnp.linspace(-6.0, 6.0, d))


def least_squares(shrink: int) -> Case:
    d = 100 // shrink
    features, targets = _normal(500 // shrink, d) / d**0.5, _normal(500 // shrink, seed=1)

    def residuals(x: Any, theta: Any, data: Any) -> Any:
        return jnp.tanh(data[0] @ x) - 0.3 * data[1], jnp.exp(0.5 * theta) * x

    def outer(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return jnp.mean((jnp.tanh(data[0] @ x) - data[1]) ** 2)

    problem = bx.Bilevel(
        bx.LeastSquares(residuals), outer, (features, targets), (features[::2], targets[::2])
    )
    return _solved("nonlinear least squares", problem, jnp.zeros(d), jnp.zeros(d))


def converged_descent(shrink: int) -> Case:
    d = 100 // shrink
    solver = bx.Descent(optax.sgd(3.0), num_steps=1000)
    problem = _logistic(1000 // shrink, d, 3e-2)
    return _solved("1,000 steps, converged", problem, jnp.zeros(d), jnp.zeros(d), solver)


def stopped_early(shrink: int) -> Case:
    d = 100 // shrink
    solver = bx.Descent(optax.sgd(0.3, momentum=0.9), num_steps=40)
    problem = _logistic(1000 // shrink, d, 1e-4)
    return _run("40 steps, stopped early", problem, jnp.zeros(d), jnp.zeros(d), solver)


def learned_step_size(shrink: int) -> Case:
    d = 100 // shrink
    plain = _logistic(1000 // shrink, d, 0.0)
    solver = bx.Descent(lambda theta: optax.sgd(jnp.exp(theta)), num_steps=200 // shrink)
    return _run("learned step size", plain, jnp.zeros(d), jnp.asarray(-1.0), solver)


def learned_start(shrink: int) -> Case:
    d = 200 // shrink
    plain = _logistic(1000 // shrink, d, 0.0)

    def inner(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return _mean_loss(x, *data)

    problem = bx.Bilevel(inner, plain.outer, plain.inner.data, plain.outer_data)
    solver = bx.Descent(optax.adam(0.05), num_steps=10)
    return _run("learned start", problem, lambda theta: theta, 0.1 * _normal(d, seed=4), solver)


def network_with_adam(shrink: int) -> Case:
    width = 32 if shrink == 1 else 4
    x0 = {
        "in": _normal(10, width) / 10**0.5,
        "bias": jnp.zeros(width),
        "out": _normal(width, seed=1) / width**0.5,
    }
    inputs = _normal(400 // shrink, 10, seed=2)
    targets = jnp.sin(inputs[:, 0]) + inputs[:, 1]

    def loss(x: Any, data: Any) -> Any:
        hidden = jnp.tanh(data[0] @ x["in"] + x["bias"][None, :])
        return jnp.mean((hidden @ x["out"] - data[1]) ** 2)

    def inner(x: Any, theta: Any, data: Any) -> Any:
        return (
            loss(x, data)
            + jnp.sum(jnp.exp(theta[0]) * x["in"] ** 2)
            + jnp.sum(jnp.exp(theta[1]) * x["out"] ** 2)
        )

    def outer(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return loss(x, data)

    half = len(targets) // 2
    data = (inputs[:half], targets[:half]), (inputs[half:], targets[half:])
    solver = bx.Descent(optax.adam(1e-2), num_steps=100 // shrink)
    theta = jnp.array([-6.0, -6.0])
    return _run("network, 100 steps of Adam", bx.Bilevel(inner, outer, *data), x0, theta, solver)


def _fixed_point(name: str, d: int, norm: float) -> Case:
    weights = _normal(d, d)
    weights = norm * weights / jnp.linalg.norm(weights, 2)

    def step(x: Any, theta: Any, data: Any) -> Any:
        return jnp.tanh(data @ x + theta)

    def outer(x: Any, theta: Any) -> Any:
        del theta
        return jnp.mean((x - 0.4) ** 2)

    problem = bx.Bilevel(bx.FixedPoint(step), outer, inner_data=weights)
    theta = 0.1 * _normal(d, seed=1)
    truth = bx.Implicit(bx.linear.GMRES(rtol=1e-11))
    tight = optx.FixedPointIteration(rtol=1e-11, atol=1e-11)
    return Case(name, problem, jnp.zeros(d), theta, None, truth, tight)


def strong_fixed_point(shrink: int) -> Case:
    return _fixed_point("fixed point, contraction 0.2", 500 // shrink, 0.4)


def weak_fixed_point(shrink: int) -> Case:
    return _fixed_point("fixed point, contraction 0.9", 500 // shrink, 1.8)


def root(shrink: int) -> Case:
    d = 60 // shrink
    matrix = _normal(d, d) / d**0.5 + 2 * jnp.eye(d)

    def equation(x: Any, theta: Any, data: Any) -> Any:
        return data @ x + 0.1 * x**3 - theta

    def outer(x: Any, theta: Any) -> Any:
        del theta
        return jnp.mean((x - 0.4) ** 2)

    problem = bx.Bilevel(bx.Root(equation), outer, inner_data=matrix)
    truth = bx.Implicit(bx.linear.GMRES(rtol=1e-11))
    return Case(
        "root of 60 equations", problem, jnp.zeros(d), _normal(d, seed=1), None, truth, None
    )


def singular(shrink: int) -> Case:
    n, d = 50 // shrink, 150 // shrink
    features = _normal(n, d) / d**0.5

    def inner(x: Any, theta: Any, data: Any) -> Any:
        return jnp.sum((data @ x - theta) ** 2)

    def outer(x: Any, theta: Any, data: Any) -> Any:
        del theta
        return jnp.mean((x - data) ** 2)

    problem = bx.Bilevel(inner, outer, features, _normal(d, seed=1))
    theta = _normal(n, seed=2)
    truth = bx.MinimumNorm()
    name = "50 equations for 150 unknowns"
    return Case(name, problem, jnp.zeros(d), theta, None, truth, bx.NewtonCG(rtol=1e-10))
