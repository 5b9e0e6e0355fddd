"""Where there are many inner solutions, the start decides which bilevel problem is solved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.testing import logistic, overparameterised, relative_error, ridge

FOLD = 0.3849001795  # 2 / (3 sqrt 3)

# U = ||A x - B theta - c||^2 / 2 with 3 equations for 7 unknowns, L = ||W x - e||^2 / 2
ORACLE = overparameterised()


def solve_overparameterised(start, x0):
    method = bx.DoubleLoop(
        bx.NewtonCG(rtol=1e-10),
        bx.MinimumNorm(),
        optimizer=bx.OuterLBFGS(),
        start=start,
    )
    return bx.solve(ORACLE.problem, x0, ORACLE.theta, method, num_steps=60)


def null_space_part():
    A = np.asarray(ORACLE.problem.inner_data["A"])
    return jnp.asarray((np.eye(7) - np.linalg.pinv(A) @ A) @ np.ones(7))


def test_cold_start_minimises_over_the_nearest_solutions():
    solution = solve_overparameterised("cold", jnp.zeros(7))
    assert solution.result == bx.RESULTS.successful
    np.testing.assert_allclose(solution.theta, [0.858306, 0.42216244], atol=1e-6)
    assert float(solution.value) == pytest.approx(0.17639656086, rel=1e-9)


def test_warm_start_keeps_what_the_first_start_brought():
    solution = solve_overparameterised("warm", null_space_part())
    np.testing.assert_allclose(solution.theta, [1.15082894, 0.11963592], atol=1e-6)
    assert float(solution.value) == pytest.approx(2.679206814, rel=1e-9)


def test_optimistic_problem_learns_the_start_too():
    # theta and the start both learnt: the best of all solutions, F = 0
    problem = bx.Bilevel(
        lambda x, t, data: ORACLE.problem.inner.fn(x, t["theta"], data),
        lambda x, t, data: ORACLE.problem.outer(x, t["theta"], data),
        ORACLE.problem.inner_data,
        ORACLE.problem.outer_data,
    )
    method = bx.DoubleLoop(
        bx.Descent(optax.sgd(0.2), num_steps=300),
        bx.Unrolled(),
        optimizer=bx.OuterLBFGS(),
    )
    theta0 = {"theta": ORACLE.theta, "start": jnp.zeros(7)}
    solution = bx.solve(problem, lambda t: t["start"], theta0, method, num_steps=80)
    assert float(solution.value) < 1e-9


def across_the_fold(start, optimizer, num_steps):
    """`U = x^4/4 - x^2/2 - theta x`; its left minimum ends at the fold. L wants a larger x."""
    problem = bx.Bilevel(lambda x, t: x**4 / 4 - x**2 / 2 - t * x, lambda x, t: (x - 2.0) ** 2)
    seen = []
    method = bx.DoubleLoop(optimizer=optimizer, start=start)
    solution = bx.solve(
        problem,
        jnp.asarray(-0.88),
        jnp.asarray(0.2),
        method,
        num_steps=num_steps,
        callback=lambda p: seen.append((float(p.theta), float(p.x))),
    )
    return solution, seen


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("optimizer", [optax.sgd(0.02), optax.adam(0.1)], ids=["sgd", "adam"])
def test_a_step_across_a_fold_is_flagged(optimizer):
    solution, seen = across_the_fold("predicted", optimizer, 16)
    results = solution.history.result
    across = [k for k, (theta, x) in enumerate(seen) if theta > FOLD and x > 0]
    first = across[0]
    assert results[first] == "jumped"
    # theta did not move on it: it went back half a step
    before, there, after = (seen[k][0] for k in (first - 1, first, first + 1))
    assert after == pytest.approx((before + there) / 2)
    # on the left branch nothing is flagged without reason
    left = [k for k, (_, x) in enumerate(seen) if x < 0]
    assert all(results[k] == "successful" for k in left)
    # the branch has ended: the run goes on along the other one, and says so
    assert results[-1] == "successful" and float(solution.theta) > FOLD and float(solution.x) > 1
    assert "jumped" in str(solution)


def test_the_same_crossing_is_silent_without_prediction():
    solution, seen = across_the_fold("warm", optax.adam(0.1), 8)
    assert seen[-1][1] > 1 and set(solution.history.result) == {"successful"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_line_search_stops_before_the_fold():
    solution, _ = across_the_fold("predicted", bx.OuterLBFGS(max_step=0.1), 20)
    assert "jumped" in solution.history.result
    assert float(solution.theta) < FOLD and float(solution.x) < 0


@pytest.mark.parametrize("build", [ridge, logistic], ids=lambda b: b.__name__)
@pytest.mark.parametrize("rtol", [1e-6, 1e-2])
def test_no_step_is_flagged_where_the_minimum_is_unique(build, rtol):
    oracle = build()
    results = {}
    for start in ("predicted", "warm"):
        method = bx.DoubleLoop(  # arrays: another number compiles nothing
            bx.NewtonCG(rtol=jnp.asarray(rtol)),
            bx.Implicit(bx.linear.CG(rtol=jnp.asarray(rtol))),
            optax.adam(0.1),
            start=start,
        )
        results[start] = bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=30)
        assert results[start].stats["num_flagged"] == 0
    error = relative_error(results["predicted"].theta, results["warm"].theta)
    assert error < 10 * rtol


def test_a_prediction_is_a_better_start():
    oracle = logistic()
    steps = {}
    for start in ("cold", "warm", "predicted"):
        method = bx.DoubleLoop(
            bx.LBFGS(rtol=1e-6), bx.Implicit(), optax.sgd(2.0, momentum=0.5), start=start
        )
        solution = bx.solve(oracle.problem, oracle.x0, oracle.theta, method, num_steps=20)
        steps[start] = int(np.sum(solution.history.num_inner_steps))
    assert steps["predicted"] < steps["warm"] < steps["cold"]


def test_bad_starts_are_refused():
    with pytest.raises(ValueError, match="'warm', 'cold' or 'predicted'"):
        bx.DoubleLoop(start="hot")
    with pytest.raises(ValueError, match="External"):
        bx.DoubleLoop(bx.External(lambda x0, theta: x0), start="predicted")
    assert jax.tree_util.tree_structure(bx.DoubleLoop()) == jax.tree_util.tree_structure(
        bx.DoubleLoop(start=None)
    )
