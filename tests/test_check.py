"""`bx.check`: Lanczos, differences, what it measures, and every reason that it can give."""

import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest

import bilevax as bx
import bilevax.testing as bt
from bilevax._diagnose.check._reasons import _CAUSES
from bilevax._diagnose.measure._differences import slope
from bilevax._diagnose.measure._lanczos import (
    growth_rate,
    largest_singular_value,
    ritz_values,
    tridiagonalise,
)

EPS = float(np.finfo(float).eps)


def check(*args, **kwargs):
    return bx.check(*args, **kwargs, verbose=False)


def at_solution(oracle):
    """The exact inner solution in the structure and dtype of the problem."""
    return jtu.tree_map(
        lambda a, b: jnp.asarray(b, a.dtype) if eqx.is_array(a) else a, oracle.x0, oracle.x_star
    )


# --- Lanczos


def symmetric(size, seed, dtype=np.float64):
    a = np.random.default_rng(seed).normal(size=(size, size))
    return (a + a.T).astype(dtype)


@partial(jax.jit, static_argnums=2)
def steps(a, start, num_steps):
    """Lanczos on pytrees: a matrix, a vector and a scalar, `None` beside them."""
    half = len(a) // 2 // 2 * 2

    def split(v):
        return {"m": v[:half].reshape(2, -1), "v": v[half:-1], "s": v[-1], "none": None}

    def matvec(t):
        return split(a @ jnp.concatenate([t["m"].ravel(), t["v"], t["s"][None]]))

    return tridiagonalise(matvec, split(start), num_steps)


def lanczos(a, start, num_steps):
    alpha, beta = steps(a, start, num_steps)
    return ritz_values(np.asarray(alpha), np.asarray(beta), float(np.finfo(a.dtype).eps))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("size", "num_steps"), [(6, 3), (30, 10), (30, 30), (120, 40)])
def test_lanczos_intervals_contain_an_eigenvalue(size, num_steps, dtype):
    for seed in range(5):
        a = symmetric(size, seed, dtype)
        exact = np.linalg.eigvalsh(a.astype(np.float64))
        start = np.random.default_rng(100 + seed).normal(size=size).astype(dtype)
        values, bounds = lanczos(a, start, num_steps)
        assert len(values) == num_steps
        nearest = np.min(np.abs(values[:, None] - exact[None, :]), axis=1)
        assert np.all(nearest <= bounds)
        rounding = 10 * np.finfo(dtype).eps * np.max(np.abs(exact)) * np.sqrt(size)
        assert values[0] >= exact[0] - rounding and values[-1] <= exact[-1] + rounding
        if num_steps == size:
            np.testing.assert_allclose(values, exact, rtol=0, atol=rounding)
        else:  # the bounds say something: at the ends they are below the spread
            assert bounds[-1] < 0.2 * (exact[-1] - exact[0])


def test_lanczos_stops_where_the_krylov_space_is_exhausted():
    a = np.diag(np.repeat([1.0, 3.0, -2.0], 100))
    start = np.random.default_rng(0).normal(size=300)
    values, bounds = lanczos(a, start, 30)
    np.testing.assert_allclose(values, [-2, 1, 3], atol=1e-12)
    assert np.all(bounds < 1e-12)
    values, _ = lanczos(0.0 * a, start, 30)
    np.testing.assert_array_equal(values, [0.0])


def test_norm_and_growth_without_symmetry():
    a = np.random.default_rng(0).normal(size=(50, 50)) / 8
    start = jnp.asarray(np.random.default_rng(1).normal(size=50))
    product, transpose = lambda v: jnp.asarray(a) @ v, lambda v: jnp.asarray(a.T) @ v
    norm = np.linalg.norm(a, 2)
    assert 0.95 * norm < float(largest_singular_value(product, transpose, start)) <= norm
    radius = np.max(np.abs(np.linalg.eigvals(a)))
    assert abs(float(growth_rate(product, start)) - radius) < 0.05 * radius
    assert float(growth_rate(lambda v: 0 * v, start)) == 0


# --- differences


@pytest.mark.parametrize(
    ("fn", "exact"),
    [
        (np.exp, 1.0),
        (lambda t: np.sin(1e3 * t), 1e3),  # a unit that is no change of order one
        (lambda t: 5.0 + t**3, 0.0),
        (lambda t: np.log(1e-4 + t), 1e4),  # not a number at the first steps
        (lambda t: 1e8 + t, 1.0),  # lost in rounding, mostly
    ],
)
def test_slopes_are_as_good_as_they_say(fn, exact):
    with np.errstate(invalid="ignore", divide="ignore"):
        found = slope(fn, fn(0.0), EPS, 0.0, max(1.0, exact / 10))
    assert abs(found.value - exact) <= found.uncertainty
    assert found.uncertainty <= 2e-2 * max(abs(exact), 1)
    assert not found.is_kink(abs(exact))


def test_a_slope_knows_the_noise_of_its_function():
    noisy = lambda t: t + 1e-6 * np.sin(1e9 * t)
    found = slope(noisy, noisy(0.0), EPS, 1e-6, 1.0)
    assert abs(found.value - 1) <= found.uncertainty <= 1e-2


@pytest.mark.parametrize(
    "fn", [abs, lambda t: max(t, 0.0) + t, lambda t: np.sqrt(t), lambda t: 3 + t + 0.1 * abs(t)]
)
def test_kinks_are_seen(fn):
    with np.errstate(invalid="ignore"):
        assert slope(fn, fn(0.0), EPS, 0.0, 1.0).is_kink(1.0)


# --- what is measured


# One of each kind; other minima are below.
@pytest.mark.parametrize("build", [bt.nested, bt.least_squares, bt.root, bt.fixed_point])
def test_all_is_well_at_the_solution(build):
    oracle = build()
    found = check(oracle.problem, at_solution(oracle), oracle.theta)
    assert found.ok and found.reason == "", found
    assert len(found.comparisons) == 4
    assert found.disagreement < 1e-8  # digest: about nine digits in float64
    assert abs(found.hypergradient_norm - norm_of(oracle.hypergradient)) < 1e-6
    assert found.inner_residual < 1e-12 and found.distance < 1e-12 and found.moved < 1e-11
    assert found.kind.lower() == oracle.kind.replace("_", "")


def norm_of(tree):
    return np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in jtu.tree_leaves(tree)))


def test_float32_agrees_to_its_precision():
    oracle = bt.nested(jnp.float32)
    found = check(oracle.problem, at_solution(oracle), oracle.theta)
    assert found.ok and found.dtype == "float32"
    assert found.disagreement < 5e-3


def test_the_numbers_of_a_quadratic_game():
    oracle = bt.quadratic()
    inner, outer = oracle.problem.inner_data, oracle.problem.outer_data
    off = at_solution(oracle) + 0.01
    found = check(oracle.problem, off, oracle.theta)
    exact = np.linalg.eigvalsh(np.asarray(inner["A"]))
    assert found.is_exact and found.curvature == "positive definite"
    np.testing.assert_allclose([found.smallest, found.largest], exact[[0, -1]], rtol=1e-12)
    np.testing.assert_allclose(found.condition, 10, rtol=1e-10)
    np.testing.assert_allclose(found.attainable, 10 * EPS, rtol=1e-10)
    np.testing.assert_allclose(found.step_size, 0.1, rtol=1e-10)
    # The way to the solution, and the residual there: both exact for a quadratic.
    np.testing.assert_allclose(found.distance, 0.01 * np.sqrt(5), rtol=1e-8)
    np.testing.assert_allclose(found.moved, 0.01 * np.sqrt(5), rtol=1e-8)
    residual = np.linalg.norm(np.asarray(inner["A"]) @ np.full(5, 0.01))
    np.testing.assert_allclose(found.inner_residual, residual, rtol=1e-8)
    # lower estimates, by ten power steps
    for measured, matrix in ((found.cross_norm, "B"), (found.adjoint_smoothness, "C")):
        norm = np.linalg.norm(np.asarray((inner | outer)[matrix]), 2)
        assert 0.95 * norm < measured <= norm * (1 + 1e-12)
    assert not found.ok  # 0.01 away is not a solution


def test_the_adjoint_smoothness_knows_third_derivatives():
    oracle = bt.scalar_root()  # x^3 = theta and L = (x - 1/2)^2/2: L'' - v F'' = 1 - 6 x v
    found = check(oracle.problem, at_solution(oracle), oracle.theta)
    x, v = oracle.x_star, oracle.v_star
    np.testing.assert_allclose(found.adjoint_smoothness, abs(1 - 6 * x * v), rtol=1e-5)
    np.testing.assert_allclose(found.smallest, 3 * x**2, rtol=1e-12)


def layer(x, theta, w):
    return jnp.tanh(w @ x + theta)


@pytest.mark.parametrize("size", [20, 210])  # dense, and by Lanczos and the power method
def test_the_map_of_a_fixed_point(size):
    w = np.random.default_rng(0).normal(size=(size, size)) * 0.5 / np.sqrt(size)
    x = np.zeros(size)
    for _ in range(200):
        x = np.tanh(w @ x + 0.3)
    problem = bx.Bilevel(bx.FixedPoint(layer, jnp.asarray(w)), lambda x, theta: jnp.sum(x**2))
    found = check(problem, jnp.asarray(x), jnp.asarray(0.3), num_directions=1)
    jacobian = (1 - x**2)[:, None] * w
    assert found.ok and found.is_exact == (size == 20)
    radius = np.max(np.abs(np.linalg.eigvals(jacobian)))
    np.testing.assert_allclose(found.spectral_radius, radius, rtol=0.05)
    np.testing.assert_allclose(found.contraction, np.linalg.norm(jacobian, 2), rtol=0.05)
    singular = np.linalg.svd(np.eye(size) - jacobian, compute_uv=False)
    np.testing.assert_allclose(found.largest, singular[0], rtol=0.02)
    assert found.smallest >= singular[-1] * (1 - 1e-9)
    assert found.smallest - found.smallest_uncertainty <= singular[-1] * 1.1
    assert "iteration converges" in str(found)


def weighted(x, theta, weights):
    return 0.5 * jnp.sum(weights * (x - jnp.exp(theta)) ** 2)


def distance_to_two(x, theta):
    return jnp.mean((x - 2.0) ** 2)


def test_many_variables():
    weights = np.linspace(1, 100, 20_000)
    problem = bx.Bilevel(weighted, distance_to_two, inner_data=weights)
    found = check(problem, jnp.ones(20_000), jnp.asarray(0.0), num_directions=1)
    assert found.ok and found.curvature == "positive definite as far as seen"
    assert not found.is_exact and "at most" in str(found) and "at least" in str(found)
    # Ritz values lie inside, and not far from the ends of a spectrum without gaps.
    assert 1 <= found.smallest < 2 and 99 < found.largest <= 100
    for end, bound in (
        (found.smallest, found.smallest_uncertainty),
        (found.largest, found.largest_uncertainty),
    ):
        assert np.min(np.abs(weights - end)) <= bound < 1
    assert 50 < found.condition <= 100


@pytest.mark.parametrize(
    ("weights", "verdict"),
    [
        (np.where(np.arange(300) < 100, 0.0, np.linspace(1, 2, 300)), "singular"),
        (np.where(np.arange(300) < 3, -1.0, np.linspace(1, 2, 300)), "indefinite"),
    ],
)
def test_lanczos_sees_curvature_that_is_not_positive(weights, verdict):
    problem = bx.Bilevel(weighted, distance_to_two, inner_data=weights)
    found = check(problem, jnp.ones(300), jnp.asarray(0.0), num_directions=0)
    assert found.curvature == verdict and not found.is_exact


def squared_distance(x, theta):
    return jnp.sum((x - theta) ** 2)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])  # x* = 0 has no scale; 1 is the outer optimum
def test_no_false_alarm(at):
    problem = bx.Bilevel(squared_distance, lambda x, theta: jnp.sum((x - 1.0) ** 2))
    found = check(problem, at, at)  # Python numbers
    assert found.ok, found


def test_a_black_box_runs_on_the_host():
    def solve(x0, theta):
        assert isinstance(theta, np.ndarray)
        return theta + 0.0 * x0

    problem = bx.Bilevel(squared_distance, lambda x, theta: jnp.sum((x - 1.0) ** 2))
    found = check(problem, jnp.full(2, 0.5), jnp.full(2, 0.5), inner_solver=bx.External(solve))
    assert found.ok, found


def test_theta_of_several_dtypes():
    def inner(x, theta):
        return jnp.sum((x - theta["a"]) ** 2) + theta["b"].astype(x.dtype) * jnp.sum(x**2)

    theta = {"a": jnp.asarray(0.5), "b": jnp.asarray(1.0, jnp.float32), "none": None, "name": "b"}
    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 1.0) ** 2))
    found = check(problem, jnp.full(2, 0.25), theta)
    assert found.ok and found.size_theta == 2, found


def test_no_inner_variables():
    problem = bx.Bilevel(lambda x, theta: jnp.sum(x**2), lambda x, theta: jnp.sum(theta**2))
    found = check(problem, jnp.zeros(0), jnp.ones(2))
    assert found.ok and found.curvature == "empty", found


# --- every reason


def logistic(**kwargs):
    oracle = bt.logistic()
    return oracle.problem, at_solution(oracle), oracle.theta, kwargs


def from_start(**kwargs):
    oracle = bt.logistic()
    inner_solver = bx.Descent(optax.sgd(1.0), num_steps=3)
    return oracle.problem, oracle.x0, oracle.theta, {"inner_solver": inner_solver, **kwargs}


def fold_inner(x, theta):
    return x**4 / 4 - x**2 / 2 - theta * x


FOLD = bx.Bilevel(fold_inner, lambda x, theta: (x - 0.5) ** 2)


def other_branch(x0, theta):
    """Newton's method from -1: the other minimum, wherever it is started."""
    step = lambda _, x: x - (x**3 - x - theta) / (3 * x**2 - 1)
    return jax.lax.fori_loop(0, 60, step, -jnp.ones_like(x0))


def torn(x0, theta):
    """Changes the branch as theta passes 0.2."""
    step = lambda _, x: x - (x**3 - x - theta) / (3 * x**2 - 1)
    start = jnp.where(theta > 0.2, -1.0, 1.0).astype(x0.dtype)
    return jax.lax.fori_loop(0, 60, step, start)


@jax.custom_jvp
def wrong_softplus(x):
    return jax.nn.softplus(x)


@wrong_softplus.defjvp
def _(primals, tangents):
    return wrong_softplus(*primals), 1.5 * jax.nn.sigmoid(primals[0]) * tangents[0]


def at(inner, outer, x, theta, **kwargs):
    return bx.Bilevel(inner, outer), jnp.asarray(x), jnp.asarray(theta), kwargs


def total(x, theta):
    return jnp.sum(x**2)


def float32_game(condition):
    oracle = bt.quadratic(jnp.float32, condition=condition)
    return oracle.problem, at_solution(oracle), oracle.theta, {}


def learned_step_size(x):
    oracle = bt.learned_step_size()
    return oracle.problem, getattr(oracle, x), oracle.theta, {}


def overparameterised(**kwargs):
    oracle = bt.overparameterised()
    return oracle.problem, at_solution(oracle), oracle.theta, kwargs


def unconverged():
    problem, x, theta, _ = logistic()
    return problem, 1.01 * x, theta, {}


def log_inner(x, theta):
    return jnp.sum((x - jnp.log(theta)) ** 2)


def held_in_inner(x, theta):
    return jnp.sum((x - jax.lax.stop_gradient(theta)) ** 2) + 0.1 * jnp.sum((x - theta) ** 2)


def held_in_outer(x, theta):
    return jnp.sum((x * jax.lax.stop_gradient(theta)) ** 2)


def softplus_inner(x, theta):
    return jnp.sum(wrong_softplus(x)) + 0.5 * jnp.sum((x - theta) ** 2)


def softplus_root(theta):
    x = np.asarray(theta)
    for _ in range(100):
        x = theta - 1.5 / (1 + np.exp(-x))
    return x


def lasso(x, theta):
    return 0.5 * jnp.sum((x - jnp.array([2.0, 0.3])) ** 2) + jnp.exp(theta) * jnp.sum(jnp.abs(x))


# name of the cause, what its sentence says, the case
CASES = {
    "nonfinite": ("_nonfinite", "NaN", lambda: at(log_inner, total, [1.0, 1.0], [-1.0, -1.0])),
    "kink of the outer objective": (
        "_kink",
        "outer objective along x",
        lambda: at(
            squared_distance, lambda x, t: jnp.sum(jnp.abs(x - 1.0)), [1.0, 1.0], [1.0, 1.0]
        ),
    ),
    "kink of the inner objective": (
        "_kink",
        "inner objective along x",
        lambda: at(lasso, total, [1.0, 0.0], 0.0),
    ),
    "kink where x is polished": (
        "_kink",
        "at the inner solution",
        lambda: at(
            squared_distance, lambda x, t: jnp.sum(jnp.abs(x - 1.0)), [1.2, 1.2], [1.0, 1.0]
        ),
    ),
    "kink of theta": (
        "_kink",
        "inner residual along theta",
        lambda: at(lambda x, t: jnp.sum((x - jnp.maximum(t, 0.0)) ** 2), total, [0.0], [0.0]),
    ),
    "stop_gradient in the inner objective": (
        "_wrong_derivative",
        "inner residual along theta",
        lambda: at(held_in_inner, total, [1.0, 1.0], [1.0, 1.0]),
    ),
    "stop_gradient in the outer objective": (
        "_wrong_derivative",
        "outer objective along theta",
        lambda: at(squared_distance, held_in_outer, [1.0, 1.0], [1.0, 1.0]),
    ),
    "wrong custom_jvp": (
        "_wrong_derivative",
        "inner objective along x",
        lambda: at(
            softplus_inner, total, softplus_root(np.array([0.1, 0.2, 0.3])), [0.1, 0.2, 0.3]
        ),
    ),
    "step size, from the start": ("_unreached", "Unrolled", lambda: learned_step_size("x0")),
    "step size, after the steps": ("_unreached", "Unrolled", lambda: learned_step_size("x")),
    "float32": ("_coarse", "float64", lambda: float32_game(3e5)),
    "float32, worse": ("_coarse", "float64", lambda: float32_game(1e7)),
    "unconverged": ("_not_converged", "1.8e-03 (relative)", unconverged),
    "maximum": ("_indefinite", "-0.869", lambda: (FOLD, -0.2091488484, 0.2, {})),
    "other branch": (
        "_jumped",
        "moved by 2.0e+00",
        lambda: (FOLD, 1.0880339147, 0.2, {"inner_solver": bx.Traceable(other_branch)}),
    ),
    "torn branch": (
        "_jumped",
        "fold",
        lambda: (FOLD, 1.0880339147, 0.2, {"inner_solver": bx.Traceable(torn)}),
    ),
    "poor inner solver": (
        "_unresolved",
        "another objective",
        lambda: logistic(inner_solver=bx.Descent(optax.sgd(1.0), num_steps=3)),
    ),
    "singular": (
        "_singular",
        "4 of the computed",
        lambda: overparameterised(rule=bx.Implicit(bx.linear.CG())),
    ),
    "flagged": (
        "_flagged",
        "adjoint_not_converged",
        lambda: logistic(rule=bx.Implicit(bx.linear.CG(max_steps=2))),
    ),
    "loose": (
        "_loose",
        "too loosely",
        lambda: logistic(rule=bx.Implicit(bx.linear.CG(num_steps=1))),
    ),
    "one step": ("_other", "OneStep", lambda: from_start(rule=bx.OneStep())),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason_is_named(case):
    cause, words, build = CASES[case]
    problem, x, theta, kwargs = build()
    found = check(problem, x, theta, **kwargs)
    applying = next((sentence for applies, sentence in _CAUSES if applies(found)), None)
    assert applying is not None and applying.__name__ == cause, found
    assert not found.ok and words in found.reason, found
    assert str(found).endswith(found.reason)
    json.dumps(found.to_dict(), allow_nan=False)


def test_every_reason_is_reached():
    assert {cause for cause, _, _ in CASES.values()} == {s.__name__ for _, s in _CAUSES}


@pytest.mark.parametrize(
    "build",
    [
        lambda: overparameterised(rule=bx.Implicit(lx.LSMR(rtol=1e-10, atol=1e-10))),
        lambda: overparameterised(rule=bx.MinimumNorm()),
        lambda: from_start(rule=bx.Unrolled()),
        lambda: (FOLD, 1.0880339147, 0.2, {}),
    ],
    ids=["LSMR", "minimum norm", "unrolled", "minimum"],
)
def test_the_remedy_helps(build):
    problem, x, theta, kwargs = build()
    found = check(problem, x, theta, **kwargs)
    assert found.ok and found.agrees and found.disagreement < 1e-8, found


def test_unrolling_sees_a_learned_step_size():
    oracle = bt.learned_step_size()
    inner_solver = bx.Descent(optax.sgd(oracle.learning_rate), num_steps=oracle.num_steps)
    found = check(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=inner_solver, rule=bx.Unrolled()
    )
    assert found.ok, found
    along = found.comparisons[-1]  # the hypergradient's own direction
    np.testing.assert_allclose(abs(along.difference), abs(oracle.hypergradient), rtol=1e-7)


def test_what_is_printed(capsys):
    problem, x, theta, _ = logistic()
    found = bx.check(problem, x, theta, num_directions=0)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n" and printed.endswith("verdict: all agrees\n")
    assert 12 <= printed.count("\n") <= 25 and max(map(len, printed.splitlines())) <= 120
    check(problem, x, theta, num_directions=0)
    assert capsys.readouterr().out == ""
    assert found.to_dict()["spectral_radius"] is None  # NaN is not JSON
    assert found.to_dict()["comparisons"][0]["direction"] == "hypergradient"


def test_bad_arguments():
    x, theta = jnp.ones(()), jnp.ones(())
    with pytest.raises(TypeError, match="bx.Bilevel"):
        check(fold_inner, x, theta)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda theta: check(FOLD, x, theta).value)(theta)
    with pytest.raises(TypeError, match="a point"):
        check(FOLD, lambda theta: theta, theta)
    with pytest.raises(ValueError, match="num_directions"):
        check(FOLD, x, theta, num_directions=-1)
    with pytest.raises(ValueError, match="max_lanczos_steps"):
        check(FOLD, x, theta, max_lanczos_steps=0)
