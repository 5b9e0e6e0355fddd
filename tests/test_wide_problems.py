"""Many entries of which few are kept: by columns, and all the same answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax._problem._predictors import predictors, product
from bilevax._problem._proximal import num_columns

NUM, SIZE = 60, 1_100
RNG = np.random.default_rng(3)
X, SEEN = RNG.normal(size=(NUM, SIZE)), RNG.normal(size=SIZE)
TARGETS = 2 * X[:, :4].sum(axis=1) + 0.1 * RNG.normal(size=NUM)
SCALES = jnp.asarray(RNG.uniform(0.5, 2, size=SIZE))


def loss(x, theta):
    """Of features that depend on theta, too."""
    predicted = (X * (1 + theta["stretch"] * SCALES)[None]) @ x
    return 0.5 * jnp.mean((predicted - TARGETS) ** 2)


NET = bx.prox.ElasticNet(lambda t: jnp.exp(t["log_l1"]), 1e-3)
PROBLEM = bx.Bilevel(bx.ProximalMinimum(loss, NET), lambda x, t: SEEN @ x)


def at(log_l1):
    return {"log_l1": jnp.asarray(log_l1), "stretch": jnp.full(np.shape(log_l1), 0.1)}


@jax.jit
@jax.vmap
def solve(theta):
    found, _ = bx.hypergradient(PROBLEM, jnp.zeros(SIZE), theta, throw=False)
    return found.x, found.grad, found.result.index


def derivative_on_the_support(x, theta):
    """Of `SEEN @ x`, by a dense solve; and by how much x violates its conditions."""
    kept = np.flatnonzero(x)
    strength = float(np.exp(theta["log_l1"]))

    def gradient(inside, theta):
        full = jnp.zeros(SIZE).at[kept].set(inside)
        return jax.grad(loss)(full, theta) + 1e-3 * full

    whole = np.asarray(gradient(x[kept], theta))
    violation = np.max(np.abs(whole[kept] + strength * np.sign(x[kept])))
    assert np.max(np.abs(np.delete(whole, kept))) < strength
    hessian = jax.jacobian(lambda inside: gradient(inside, theta)[kept])(x[kept])
    moved = jax.jacobian(lambda t: gradient(x[kept], t)[kept])(theta)
    v = np.linalg.solve(hessian, SEEN[kept])
    return violation, {
        "log_l1": -v @ (strength * np.sign(x[kept])),
        "stretch": -v @ np.asarray(moved["stretch"]),
    }


def test_few_and_many_entries_are_kept():
    """In one batch: a strong penalty, and one that leaves more than are searched at once."""
    thetas = at(np.log([1.0, 0.01]))
    xs, grads, results = map(jax.device_get, solve(thetas))
    most = num_columns(jnp.zeros(SIZE))
    assert 0 < np.sum(xs[0] != 0) <= most < np.sum(xs[1] != 0)
    for i, x in enumerate(xs):
        assert results[i] == 0
        violation, exact = derivative_on_the_support(x, at(float(thetas["log_l1"][i])))
        assert violation < 1e-6
        for name, value in exact.items():
            assert grads[name][i] == pytest.approx(float(value), rel=1e-5)


def test_derivatives_of_the_solution_map():
    theta, move = at(0.0), {"log_l1": jnp.array(0.3), "stretch": jnp.array(-0.2)}
    solution = bx.argmin(PROBLEM.inner, bx.ProximalNewton(rtol=1e-12))

    def slope(t):
        return jax.jvp(
            lambda t: SEEN @ solution(jnp.zeros(SIZE), at_step(t)), (t,), (jnp.ones_like(t),)
        )[1]

    def at_step(t):
        return jax.tree.map(lambda a, b: a + t * b, theta, move)

    first, second = jax.jit(lambda t: jax.jvp(slope, (t,), (jnp.array(1.0),)))(jnp.array(0.0))
    _, exact = derivative_on_the_support(np.asarray(solution(jnp.zeros(SIZE), theta)), theta)
    by_hand = sum(float(exact[name] * move[name]) for name in exact)
    assert float(first) == pytest.approx(by_hand, rel=1e-8)
    h = 1e-4
    difference = (jax.jit(slope)(jnp.array(h)) - jax.jit(slope)(jnp.array(-h))) / (2 * h)
    assert float(second) == pytest.approx(float(difference), rel=1e-5)


def test_a_function_is_taken_apart_where_it_sees_products_alone():
    rows, x = jnp.asarray(X[:5, :8]), jnp.zeros(8).at[3].set(1.0).at[6].set(-2.0)

    def both_ways(x, t):
        return jnp.sum(jax.nn.softplus((t * rows) @ x)) + jnp.sum(jnp.dot(x, rows.T) ** 3)

    def apart(x, t):
        parts = predictors(lambda x: both_ways(x, t), x)
        assert parts is not None and len(parts.matrices) == 2
        return parts.rest([product(2, m, x) for m in parts.matrices])

    t = jnp.array(0.7)
    for kept in (x, x.at[0].set(0.5)):  # as many as are few, and one more
        here, there = (jax.hessian(fn, (0, 1))(kept, t) for fn in (both_ways, apart))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), here, there)
        here, there = (jax.grad(fn, (0, 1))(kept, t) for fn in (both_ways, apart))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), here, there)
    for other in (lambda x: jnp.sum(rows @ x) + x @ x, lambda x: rows @ (2 * x), lambda x: x**2):
        assert predictors(lambda x, other=other: jnp.sum(other(x)), x) is None
