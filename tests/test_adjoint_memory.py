"""What is kept from one outer step to the next, in `hypergradient` and in `solve`."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._hypergradient._entry import _estimate
from bilevax.testing import EVEN_FREQUENCIES, relative_error, ridge

ORACLE = ridge(
    num_samples=120,
    num_features=60,
    num_validation=40,
    feature_scale_decades=2.0,
    frequencies=EVEN_FREQUENCIES,
)
TIGHT = bx.linear.CG(rtol=1e-11)
RULES = {
    "plain": bx.Implicit(TIGHT),
    "recycled": bx.Implicit(bx.linear.Recycled(TIGHT, 10)),
    "nystrom": bx.Implicit(TIGHT, bx.precondition.Nystrom(20)),
    "jacobi": bx.Implicit(TIGHT, bx.precondition.Jacobi()),
    "both": bx.Implicit(bx.linear.Recycled(TIGHT, 10), bx.precondition.Jacobi()),
    "function": bx.Implicit(TIGHT, lambda x, theta: lambda r: 2.0 * r),
}


@pytest.mark.parametrize("name", list(RULES))
def test_a_sequence_of_hypergradients(name):
    solver, steps, state = bx.NewtonCG(rtol=1e-12), [], None
    for k in range(4):
        theta = jnp.asarray(ORACLE.theta) + 1e-3 * k
        estimate, state = bx.hypergradient(
            ORACLE.problem, ORACLE.x0, theta, inner_solver=solver, rule=RULES[name], state=state
        )
        if k == 0:
            num_compilations = _estimate.num_compilations()
        exact = ORACLE.reference(np.asarray(theta)).hypergradient
        assert relative_error(estimate.grad, exact) < 1e-8
        steps.append(int(estimate.stats["num_adjoint_steps"]))
    assert _estimate.num_compilations() == num_compilations
    if name in ("recycled", "both"):
        assert steps[-1] < 0.8 * steps[0]


def test_a_run_with_memory_takes_fewer_products():
    solutions = {
        name: bx.solve(
            ORACLE.problem,
            ORACLE.x0,
            ORACLE.theta,
            bx.DoubleLoop(bx.NewtonCG(rtol=1e-10), rule, optax.adam(1e-2)),
            num_steps=20,
        )
        for name, rule in RULES.items()
        if name in ("plain", "recycled", "jacobi")
    }
    steps = {name: np.sum(s.history.num_adjoint_steps) for name, s in solutions.items()}
    assert steps["recycled"] < 0.95 * steps["plain"]
    assert steps["jacobi"] < 0.8 * steps["plain"]
    for solution in solutions.values():
        assert relative_error(solution.theta, solutions["plain"].theta) < 1e-6


def test_accuracy_on_demand_loosens_along_a_run():
    method = bx.DoubleLoop(hypergradient=bx.Accurate(1e-2), optimizer=optax.adam(1e-2))
    solution = bx.solve(ORACLE.problem, ORACLE.x0, ORACLE.theta, method, num_steps=10)
    assert solution.stats["num_flagged"] == 0
    norm = solution.history.hypergradient_norm
    assert np.all(solution.history.error_estimate <= 1e-2 * norm)


FOLD = bx.Bilevel(lambda x, theta: x**4 / 4 - x**2 / 2 - theta * x, lambda x, theta: x + 0 * theta)


@pytest.mark.parametrize(
    ("x", "response"),
    [
        (1.0880339147, 0.3919334763),
        (-0.8788850662, 0.7591187936),
        (-0.2091488484, None),
    ],
)
def test_the_three_roots_before_a_fold(x, response):
    """Two minima with their responses, and a maximum, which is none."""
    solver = bx.Given(rtol=1e-8)
    estimate, _ = bx.hypergradient(
        FOLD, jnp.array(x), jnp.array(0.2), inner_solver=solver, throw=False
    )
    if response is None:
        assert estimate.result == bx.RESULTS.negative_curvature
    else:
        assert estimate.result == bx.RESULTS.successful
        polished, _ = bx.hypergradient(
            FOLD, jnp.array(x), jnp.array(0.2), inner_solver=solver, rule=bx.Polished()
        )
        assert float(polished.grad) == pytest.approx(response, abs=1e-9)


def test_a_maximum_is_flagged_even_where_the_outer_objective_is_flat():
    problem = bx.Bilevel(FOLD.inner, lambda x, theta: (x + 0.2091488484) ** 2 * 0 + theta)
    estimate, _ = bx.hypergradient(
        problem,
        jnp.array(-0.2091488484),
        jnp.array(0.2),
        inner_solver=bx.Given(rtol=1e-8),
        throw=False,
    )
    assert estimate.result == bx.RESULTS.negative_curvature
