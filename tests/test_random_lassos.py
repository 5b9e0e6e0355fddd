"""Random lassos, at any strength and at the knots of their path: right, or flagged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import lars_path

import bilevax as bx

NUM_SAMPLES, SIZE = 20, 8


def half_squares(x, theta, data):
    del theta
    return 0.5 * jnp.sum((data[0] @ x - data[1]) ** 2)


@functools.cache
def batch(dtype):
    """Outcomes and hypergradients of many, in one program."""

    def one(data, target, weights, theta):
        condition = bx.ProximalMinimum(
            half_squares, bx.prox.L1(lambda t: jnp.exp(t)), (data, target)
        )
        problem = bx.Bilevel(condition, lambda x, t: weights @ x)
        start = jnp.zeros(SIZE, dtype)
        found, _ = bx.hypergradient(problem, start, theta, throw=False)
        return found.result.index, found.grad, found.x

    return jax.jit(jax.vmap(one))


def draw(rng, num, near_a_knot, dtype="float64"):
    """Problems of numbers that `dtype` has, their strengths, and the path's active sets.

    No nearer to a knot than the rounding of the strength and of the data.
    """
    nearest = 14 if dtype == "float64" else 5
    problems = []
    for _ in range(num):
        scale = np.exp(rng.normal(size=SIZE) * rng.choice([0, 1]))
        mix = np.eye(SIZE) + rng.choice([0, 0.3, 2]) * rng.normal(size=(SIZE, SIZE))
        data = rng.normal(size=(NUM_SAMPLES, SIZE)) @ mix * scale
        target = data @ (rng.normal(size=SIZE) * (rng.uniform(size=SIZE) < 0.5))
        target += rng.choice([1e-3, 0.3]) * rng.normal(size=NUM_SAMPLES)
        data, target = (a.astype(dtype).astype(float) for a in (data, target))
        knots, _, path = lars_path(data, target, method="lasso", eps=1e-15)
        knots = knots * NUM_SAMPLES
        if near_a_knot:
            knot = rng.choice(knots[:-1])
            strength = knot * (1 + rng.choice([-1, 1]) * 10.0 ** -rng.uniform(2, nearest))
        else:
            strength = knots[0] * np.exp(rng.uniform(-5, 0.3))
        weights = rng.normal(size=SIZE).astype(dtype).astype(float)
        problems.append((data, target, weights, strength, reference(knots, path, strength)))
    return problems


def reference(knots, path, strength):
    """The active set and its signs between two knots, `None` beyond the first one."""
    if strength >= knots[0]:
        return None
    k = int(np.searchsorted(-knots, -strength)) - 1
    last = min(k + 1, path.shape[1] - 1)
    middle = 0.5 * (path[:, k] + path[:, last])
    return np.flatnonzero(middle), np.sign(middle)


def exact(problem, x):
    """By the active set of the path or, where rounding has spoiled that, of `x`, if it is right."""
    data, target, weights, strength, known = problem
    for active, signs in (known or ([], []), (np.flatnonzero(x), np.sign(x))):
        if len(active) and is_solution(data, target, strength, active, signs[active]):
            part = data[:, active]
            return -strength * signs[active] @ np.linalg.solve(part.T @ part, weights[active])
    return None


def is_solution(data, target, strength, active, signs):
    part = data[:, active]
    on = np.linalg.solve(part.T @ part, part.T @ target - strength * signs)
    gradient = np.delete(data, active, axis=1).T @ (part @ on - target)
    return np.all(np.sign(on) == signs) and np.all(np.abs(gradient) < strength)


@pytest.mark.parametrize("near_a_knot", [False, True], ids=["anywhere", "near a knot"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_random_lassos_are_right_or_flagged(dtype, near_a_knot):
    num = 500 if dtype == "float64" else 150
    problems = draw(np.random.default_rng(near_a_knot), num, near_a_knot, dtype)
    columns = [np.stack([p[i] for p in problems]).astype(dtype) for i in range(3)]
    strengths = np.array([p[3] for p in problems])
    results, grads, xs = batch(dtype)(*map(jnp.asarray, columns), jnp.log(strengths).astype(dtype))
    names = np.array(bx.RESULTS.names())[np.asarray(results)]
    right, wrong, flagged, false_alarms = 0, [], 0, 0
    for i, (problem, grad) in enumerate(zip(problems, np.asarray(grads), strict=True)):
        expected = exact(problem, np.asarray(xs[i], float))
        bound = 1e-2 * max(1e-6, abs(expected or 0))
        is_right = expected is not None and abs(grad - expected) <= bound
        if names[i] == "successful":
            right += is_right
            wrong += [] if is_right else [(i, grad, expected)]
        else:
            flagged += 1
            false_alarms += is_right and not near_a_knot
    assert not wrong, f"{len(wrong)} of {num}: {wrong[:5]}"
    assert right >= (0.3 if near_a_knot else 0.7) * num, (right, flagged)
    assert false_alarms <= (0.02 if dtype == "float64" else 0.1) * num, (false_alarms, flagged)
