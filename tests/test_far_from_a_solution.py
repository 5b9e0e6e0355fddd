"""A small residual does not make a solution: the Newton step tells how far x is."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._inner._asked import asked_of
from bilevax._inner._default import as_inner_solver
from bilevax._inner._explain import _is_kink

SOFT = 1e-8


def bent(x, theta, data):
    """A quadratic with one soft direction, in units of the variables."""
    y = data["units"] * x
    return 0.5 * y @ (data["A"] @ y) - y @ (data["A"] @ (data["shift"] * theta))


def outer(x, theta, data):
    return jnp.sum((data["units"] * x) ** 2) + theta**2


def problem_and_point(off):
    """`x` that is a solution but for its part in the soft direction, `1 + off` times too large."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    eigenvalues = np.array([1.0, 0.7, 0.4, SOFT])
    units = 10.0 ** np.array([-6.0, 0.0, 3.0, 8.0])
    shift = q @ np.ones(4)
    data = {"A": (q * eigenvalues) @ q.T, "units": units, "shift": shift}
    data = {name: jnp.asarray(a) for name, a in data.items()}
    x = (q @ np.array([1.0, 1.0, 1.0, 1 + off])) / units
    problem = bx.Bilevel(bent, outer, inner_data=data, outer_data=data)
    return problem, jnp.asarray(x), jnp.asarray(1.0)


def hypergradient(problem, x, theta, rule):
    return bx.hypergradient(problem, x, theta, inner_solver=bx.Given(), rule=rule, throw=False)[0]


@pytest.mark.parametrize("rule", [bx.Implicit(), bx.MinimumNorm()])
def test_an_x_that_is_off_in_a_soft_direction_is_flagged(rule):
    close = hypergradient(*problem_and_point(1e-4), rule)
    assert close.result == "successful"
    np.testing.assert_allclose(close.grad, 10.0, rtol=1e-3)  # 2 |shift|^2 + 2 theta
    far = hypergradient(*problem_and_point(0.5), rule)
    assert far.inner_residual < far.inner_tolerance  # nothing to see there
    assert far.result == "inner_not_converged"


def test_it_is_flagged_in_all_views():
    problem, x, theta = problem_and_point(0.5)
    inner = bx.Minimum(problem.inner.fn, data=problem.inner_data)

    def loss(theta):
        return outer(bx.argmin(inner, bx.Given())(x, theta), theta, problem.outer_data)

    with pytest.raises(Exception, match="did not converge"):
        jax.block_until_ready(jax.grad(loss)(theta))
    assert bx.jacobian(problem, x, theta, throw=False).result == "inner_not_converged"
    vector = bx.Bilevel(
        bent,
        lambda x, theta, data: jnp.stack([outer(x, theta, data), theta]),
        inner_data=problem.inner_data,
        outer_data=problem.outer_data,
    )
    several = bx.hypergradients(vector, x, theta, inner_solver=bx.Given(), throw=False)
    assert several.result == "inner_not_converged"


def test_who_stops_early_on_purpose_is_not_told():
    problem, x, theta = problem_and_point(0.5)
    for rule in (bx.Implicit(inexact=True), bx.MinimumNorm(inexact=True)):
        assert hypergradient(problem, x, theta, rule).result == "successful"


@pytest.mark.parametrize("given", [bx.Given(rtol=1e-2), bx.Given(atol=1e6)])
def test_who_asks_for_little_is_not_told(given):
    problem, x, theta = problem_and_point(0.5)
    estimate, _ = bx.hypergradient(problem, x, theta, inner_solver=given, throw=False)
    assert estimate.result == "successful"


@pytest.mark.parametrize(
    ("solver", "rtol", "atol"),
    [
        (bx.Optimistix(optx.BFGS(1e-8, 1e-8)), 1e-6, 0),  # habit
        (bx.Optimistix(optx.BFGS(1e-2, 1e-8)), 1e-2, 0),
        (bx.Optimistix(optx.BFGS(1e-8, 1e-8), atol=1e-3), 1e-6, 1e-3),
        (bx.Optimistix(bx.LBFGS(rtol=1e-3, atol=1e-2)), 1e-3, 1e-2),
        (bx.External(lambda x, theta: x, rtol=1e-5), 1e-5, 0),
        (bx.Given(), 1e-6, 0),
    ],
)
def test_what_was_asked_for(solver, rtol, atol):
    asked = asked_of(solver, jnp.ones(2))
    np.testing.assert_allclose([asked.rtol, asked.atol], [rtol, atol])


def test_solutions_that_are_zero_are_solutions():
    """Nothing but rounding is left of x, or of one of its variables, and of the step."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)))
    a = jnp.concatenate([a, -a])
    A = jnp.array([[2.0, 1.0], [1.0, 2.0]])

    def all_zero(x, theta):
        return 0.5 * theta * jnp.sum(x**2) + jnp.sum(jnp.log(jnp.cosh(a @ x)))

    def one_zero(x, theta):
        return 0.5 * x @ A @ x - theta * jnp.array([2.0, 1.0]) @ x

    for inner, size in ((all_zero, 4), (one_zero, 2)):
        problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 1.0) ** 2) + theta)
        for x0 in (jnp.ones(size), jnp.zeros(size)):
            for solver in (None, bx.LBFGS()):
                estimate, _ = bx.hypergradient(
                    problem, x0, jnp.asarray(1.0), inner_solver=solver, throw=False
                )
                assert estimate.result == "successful"


def test_what_turns_within_a_step_is_no_kink():
    """`log cosh` of numbers so large that a step of 1e-5 x leads across the whole of its bend."""
    c = jnp.array([3.0, -2.0, 1.0])

    def inner(x, theta):  # large x along which there is next to no curvature
        t = jnp.abs(c @ x - theta)
        return 0.5e-12 * jnp.sum(x**2) - 1e-6 * jnp.sum(x) + t + jnp.log1p(jnp.exp(-2 * t))

    condition, x0, theta = bx.Minimum(inner), jnp.zeros(3), jnp.asarray(0.3)
    solver = as_inner_solver(None, condition, x0)
    found, _ = solver.solve(condition, x0, theta, solver.init(condition, x0, theta))
    assert float(jnp.max(jnp.abs(found.x))) > 1e5
    assert found.result == "successful"


@pytest.mark.parametrize(
    ("inner", "x", "is_kink"),
    [
        (lambda x, theta: 0.5 * (x - theta) ** 2 + jnp.abs(x), 1e-9, True),
        (lambda x, theta: 0.5 * (x - theta) ** 2 + jnp.abs(x - 1e-7), 1e-9, True),
        (lambda x, theta: 0.5 * (x - theta) ** 2 + 1e-7 * jnp.log(jnp.cosh(x / 1e-7)), 1e-9, False),
        (lambda x, theta: theta * x - 1e-9 * jnp.log(x), 1e-7, False),
    ],
    ids=["kink", "kink beside x", "bend", "barrier"],
)
def test_a_kink_is_at_a_point_and_inside_the_domain(inner, x, is_kink):
    condition, theta = bx.Minimum(inner), jnp.asarray(0.5)
    x, x0 = jnp.asarray(x), jnp.asarray(1.0)
    residual = jnp.abs(jax.grad(inner)(x, theta))
    found = _is_kink(condition, x, x0, theta, residual, jnp.asarray(1e-8))
    assert bool(found) == is_kink
