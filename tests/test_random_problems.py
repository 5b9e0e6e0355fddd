"""Bad problems, at random: every answer is right, or says that it is not.

1,000 strongly convex problems with condition numbers up to 1e8, and 500 singular,
indefinite, inconsistent, non-finite and too ill-conditioned ones. Hypothesis draws them
without randomness, so that a failure is there again on the next run.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from random_problems import (
    LOG_CONDITION,
    NUM_EXAMPLES,
    Quadratic,
    draw,
    draw_indefinite,
    draw_singular,
    exact,
    problem,
    quadratic_problem,
)

import bilevax as bx

pytestmark = pytest.mark.slow

SEEDS = st.integers(0, 2**31)


def drawn(num_examples):
    return settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def solve(problem, x0, theta, solver, rule):
    x0, theta = jnp.asarray(x0), jnp.asarray(theta)
    return bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=rule, throw=False)[0]


def distance(a, b):
    return float(np.linalg.norm(np.asarray(a, float) - b))


@pytest.mark.parametrize("size", NUM_EXAMPLES)
def test_the_bound_holds_and_the_estimate_is_close(size):
    ratios = []

    @drawn(NUM_EXAMPLES[size])
    @given(
        SEEDS,
        st.floats(0, LOG_CONDITION[size]),
        st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        st.floats(-8, -2),
        st.floats(-8, -2),
    )
    def check(seed, log_condition, nonlinearity, log_inner, log_linear):
        data, theta = draw(seed, size, log_condition, nonlinearity)
        _, grad = exact(data, theta)
        solver = bx.NewtonCG(rtol=jnp.asarray(10.0**log_inner))
        rule = bx.Implicit(bx.linear.CG(rtol=jnp.asarray(10.0**log_linear)), error_estimate=True)
        estimate = solve(problem(data), np.zeros(size), theta, solver, rule)
        error = distance(estimate.grad, grad)
        assert error <= estimate.error_bound
        # Rounding errors of x and v, which a solve in the same precision cannot see.
        rounding = 2e-16 * 10**log_condition * np.linalg.norm(grad)
        ratios.append((float(estimate.error_estimate) + rounding) / (error + rounding))

    check()
    ratios = np.array(ratios)
    assert len(ratios) >= NUM_EXAMPLES[size]
    assert np.mean((ratios >= 1 / 3) & (ratios <= 3)) >= 0.95


@pytest.mark.parametrize("size", NUM_EXAMPLES)
def test_the_accuracy_asked_for_is_delivered(size):
    delivered = []

    @drawn(NUM_EXAMPLES[size])
    @given(
        SEEDS,
        st.floats(0, LOG_CONDITION[size]),
        st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]),
    )
    def check(seed, log_condition, nonlinearity, rtol):
        data, theta = draw(seed, size, log_condition, nonlinearity)
        _, grad = exact(data, theta)
        rule = bx.Accurate(jnp.asarray(rtol))
        estimate = solve(problem(data), np.zeros(size), theta, None, rule)
        relative = distance(estimate.grad, grad) / np.linalg.norm(grad)
        is_claimed = bool(estimate.result == bx.RESULTS.successful)
        assert relative <= 10 * rtol or not is_claimed  # never silently wrong
        delivered.append(is_claimed and relative <= rtol)

    check()
    assert len(delivered) >= NUM_EXAMPLES[size]
    assert np.mean(delivered) >= 0.99


def outcome(estimate):
    return next(name for name in OUTCOMES if bool(estimate.result == getattr(bx.RESULTS, name)))


OUTCOMES = (
    "successful",
    "inner_not_converged",
    "adjoint_not_converged",
    "negative_curvature",
    "singular",
    "nonfinite",
    "stalled",
    "inaccurate",
    "diverged",
)
# Below and above 32, from where on a Newton step is not factorised.
DEGENERATE_SIZES = (2, 20, 60)
RULES = {
    "default": None,
    "CG": bx.Implicit(bx.linear.CG()),
    "MinimumNorm": bx.MinimumNorm(),
    "by adjoint": bx.MinimumNorm(max_tangents=1),
}

# In very few variables CG may see so little of the matrix that it takes the rounding errors
# of a null vector for curvature (one in 300): flagged, but by the wrong name. It is not the
# default there.
BY_CG = {False: ("singular",), True: ("singular", "negative_curvature")}


@pytest.mark.parametrize("size", DEGENERATE_SIZES)
def test_singular_problems(size):
    """The response of smallest norm, by every rule that can; others say `singular`."""

    @drawn(50)
    @given(SEEDS, st.floats(0, 3))
    def check(seed, log_condition):
        data, theta, x, grad = draw_singular(seed, size, 3, log_condition, 0.0)
        for name, rule in RULES.items():
            estimate = solve(quadratic_problem(data), x, theta, bx.NewtonCG(rtol=1e-10), rule)
            if name == "CG":
                assert outcome(estimate) in BY_CG[size < 20]
            else:
                assert outcome(estimate) == "successful"
                # the inner tolerance and the condition number of the range
                assert distance(estimate.grad, grad) <= 1e-5 * np.linalg.norm(grad)

    check()


@pytest.mark.parametrize("size", DEGENERATE_SIZES)
def test_singular_problems_without_a_differentiable_solution(size):
    @drawn(33)
    @given(SEEDS, st.floats(0, 3), st.sampled_from([1e-2, 1.0]))
    def check(seed, log_condition, inconsistency):
        data, theta, x, _ = draw_singular(seed, size, 3, log_condition, inconsistency)
        for name, rule in RULES.items():
            estimate = solve(quadratic_problem(data), x, theta, bx.Given(rtol=1e-6), rule)
            assert outcome(estimate) in (BY_CG[size < 20] if name == "CG" else ("singular",))

    check()


@pytest.mark.parametrize("size", DEGENERATE_SIZES)
def test_indefinite_problems(size):
    @drawn(33)
    @given(SEEDS, st.floats(0, 3))
    def check(seed, log_condition):
        data, theta, x = draw_indefinite(seed, size, 3, log_condition)
        for rule in RULES.values():
            estimate = solve(quadratic_problem(data), x, theta, bx.Given(rtol=1e-6), rule)
            assert outcome(estimate) == "negative_curvature"

    check()


@pytest.mark.parametrize("size", DEGENERATE_SIZES)
def test_problems_that_are_not_finite(size):
    @drawn(33)
    @given(SEEDS, st.integers(0, 3), st.sampled_from([np.nan, np.inf, -np.inf]))
    def check(seed, which, bad):
        data, theta, x, _ = draw_singular(seed, size, 3, 1.0, 0.0)
        arrays = [np.array(a) for a in data]
        arrays[which].flat[seed % arrays[which].size] = bad
        for rule in RULES.values():
            for solver in (bx.NewtonCG(rtol=1e-10), bx.Given(rtol=1e-6)):
                estimate = solve(quadratic_problem(Quadratic(*arrays)), x, theta, solver, rule)
                assert outcome(estimate) == "nonfinite"

    check()


@pytest.mark.parametrize("size", [2, 20, 60])
def test_more_than_single_precision_can_give(size):
    @drawn(30)
    @given(SEEDS, st.floats(2, 12), st.sampled_from([1e-1, 1e-2, 1e-4]))
    def check(seed, log_condition, rtol):
        data, theta = draw(seed, size, log_condition, 1.0)
        # What single precision is given, it is given exactly.
        data = type(data)(*(np.asarray(np.asarray(a, np.float32), float) for a in data))
        theta = np.asarray(np.asarray(theta, np.float32), float)
        if np.linalg.eigvalsh(data.A)[0] <= 0:  # by rounding: another test
            return
        _, grad = exact(data, theta)
        given_problem = problem(type(data)(*(np.asarray(a, np.float32) for a in data)))
        rule = bx.Accurate(jnp.asarray(rtol, jnp.float32))
        estimate = solve(given_problem, np.zeros(size, np.float32), np.float32(theta), None, rule)
        if outcome(estimate) == "successful":
            assert distance(estimate.grad, grad) <= 10 * rtol * np.linalg.norm(grad)

    check()
