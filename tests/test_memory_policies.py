"""What unrolling keeps, and what it says about the way back."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._loop import _binomial
from bilevax._loop._scan import repeat
from bilevax.testing import logistic, relative_error

ORACLE = logistic()


@lru_cache(None)
def fewest_steps(length, num_checkpoints):
    """Steps taken to reverse `length` steps, by dynamic programming."""
    if length <= 1:
        return 0
    if num_checkpoints == 1:
        return length * (length - 1) // 2
    return min(
        m + fewest_steps(length - m, num_checkpoints - 1) + fewest_steps(m, num_checkpoints)
        for m in range(1, length)
    )


def steps_taken(length, num_checkpoints):
    """The same for the schedule of `repeat_from_checkpoints`, on the host."""
    reach = _binomial._reach_table(length, num_checkpoints)
    places, end, total = [0], length, 0
    while end > 0:
        room = num_checkpoints - len(places)
        ahead = int(_binomial._steps_ahead(reach, end - places[-1], room, np))
        total += ahead
        if places[-1] + ahead < end - 1:
            places.append(places[-1] + ahead)
        else:
            end -= 1
            if places[-1] == end:
                places.pop()
    return total


@pytest.mark.parametrize("num_checkpoints", [1, 2, 3, 5, 8])
def test_no_schedule_takes_fewer_steps(num_checkpoints):
    for length in [*range(1, 45), 90]:
        assert steps_taken(length, num_checkpoints) == fewest_steps(length, num_checkpoints)


def test_the_number_of_passes_is_binomial():
    # binom(10 + 4, 4) = 1001: with ten carries a thousand steps are taken four times at most
    assert _binomial._reach_table(1001, 10).shape[1] - 1 == 4
    assert _binomial._reach_table(1002, 10).shape[1] - 1 == 5


MATRIX = jnp.asarray(0.3 * np.random.default_rng(0).standard_normal((5, 5)))
POLICIES = [1, 2, 5, 40, "sqrt", "all", bx.MemoryBudget(2_000), bx.MemoryBudget(10**6)]


def value(theta, length, checkpoints):
    """Steps that carry counts too, and depend on theta in two ways."""

    def step(carry):
        x, (velocity, count) = carry
        pull = jnp.sin(MATRIX @ x + theta)
        return x - 0.3 * pull + 0.1 * velocity, (0.5 * velocity + theta * x, count + 1)

    carry = (jnp.ones(5), (jnp.zeros(5), jnp.zeros((), jnp.int32)))
    if checkpoints is None:
        for _ in range(length):
            carry = step(carry)
    else:
        carry = repeat(step, carry, length, checkpoints)
        assert carry[1][1].dtype == jnp.int32
    return jnp.sum(carry[0] ** 2)


THETA = jnp.linspace(-1, 1, 5)


@pytest.mark.parametrize("length", [1, 2, 7, 24])
def test_every_policy_gives_the_derivative_of_a_python_loop(length):
    expected = jax.grad(value)(THETA, length, None)
    for checkpoints in POLICIES:
        found = jax.jit(jax.grad(value), static_argnums=(1, 2))(THETA, length, checkpoints)
        assert relative_error(found, expected) < 1e-12, checkpoints


def test_transformations_of_the_binomial_policy():
    hessian = jax.hessian(value)(THETA, 7, None)
    assert relative_error(jax.jacfwd(jax.grad(value))(THETA, 7, 3), hessian) < 1e-12
    batch = jnp.stack([THETA, 2 * THETA])
    grads = jax.vmap(lambda theta: jax.grad(value)(theta, 7, 3))(batch)
    assert relative_error(grads[1], jax.grad(value)(2 * THETA, 7, None)) < 1e-12
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda theta: value(theta, 7, 3), (THETA,), (THETA,))


def estimate(rule, num_steps=30, optimizer=None, problem=None, x0=None, theta=None):
    optimizer = optax.sgd(0.5, momentum=0.5) if optimizer is None else optimizer
    return bx.hypergradient(
        problem or ORACLE.problem,
        ORACLE.x0 if x0 is None else x0,
        ORACLE.theta if theta is None else theta,
        inner_solver=bx.Descent(optimizer, num_steps=num_steps),
        rule=rule,
        throw=False,
    )[0]


def test_memory_budget_says_what_it_needs():
    with pytest.raises(ValueError, match=r"at least [\d,]+ bytes"):
        estimate(bx.Unrolled(checkpoints=bx.MemoryBudget(10)))
    for wrong in (1e6, True, "1 MB"):
        with pytest.raises(TypeError, match="integer"):
            bx.MemoryBudget(wrong)
    with pytest.raises(ValueError, match="positive"):
        bx.MemoryBudget(0)


@pytest.mark.parametrize("checkpoints", [0, -1, 1.5, True, None, "some"])
def test_policies_that_are_none(checkpoints):
    with pytest.raises(ValueError, match="MemoryBudget"):
        bx.Unrolled(checkpoints=checkpoints)


def temp_bytes(checkpoints, size=500, num_steps=5_000):
    def inner(x, theta):
        return 0.5 * jnp.sum(jnp.exp(theta) * x**2) - jnp.sum(jnp.sin(x))

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum(x**2))

    def grad(theta):
        rule = bx.Unrolled(checkpoints=checkpoints)
        return estimate(rule, num_steps, optax.sgd(1e-3), problem, jnp.ones(size), theta).grad

    compiled = jax.jit(grad).lower(jnp.zeros(size)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_within_what_was_asked_for():
    carry = 8 * 500
    assert temp_bytes("sqrt") < 4 * 5_000**0.5 * carry
    assert temp_bytes(20) < 30 * carry
    for budget in (100_000, 400_000, 1_000_000):
        used = temp_bytes(bx.MemoryBudget(budget))
        assert 0.3 * budget < used <= budget


def test_a_solver_that_stops_by_itself_keeps_what_it_may():
    for checkpoints in (3, bx.MemoryBudget(100_000)):  # "sqrt" is in `test_unrolled.py`
        found, _ = bx.hypergradient(
            ORACLE.problem,
            ORACLE.x0,
            ORACLE.theta,
            inner_solver=optx.BFGS(rtol=1e-10, atol=1e-10),
            rule=bx.Unrolled(checkpoints=checkpoints),
        )
        assert relative_error(found.grad, ORACLE.hypergradient) < 1e-6


def test_a_solver_that_stops_by_itself_is_not_run_backwards():
    with pytest.raises(TypeError, match="fixed number of steps"):
        bx.hypergradient(
            ORACLE.problem,
            ORACLE.x0,
            ORACLE.theta,
            inner_solver=optx.BFGS(rtol=1e-10, atol=1e-10),
            rule=bx.Unrolled(checkpoints="reversible"),
        )


def chaotic_problem():
    """Logistic maps: the derivative of 200 steps has about sixty digits."""
    inner = bx.FixedPoint(lambda x, theta: theta * x * (1 - x))
    return bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 0.4) ** 2))


@pytest.mark.parametrize("checkpoints", ["sqrt", "all", 5])
def test_an_exploding_derivative_is_flagged(checkpoints):
    solver = bx.Optimistix(optx.FixedPointIteration(0.0, 0.0), max_steps=200)
    for theta, is_chaotic in ((3.9, True), (2.5, False)):
        found, _ = bx.hypergradient(
            chaotic_problem(),
            jnp.array([0.2, 0.3]),
            jnp.array(theta),
            inner_solver=solver,
            rule=bx.Unrolled(num_steps=200, checkpoints=checkpoints),
            throw=False,
        )
        assert bool(found.result == bx.RESULTS.exploding) == is_chaotic
        assert bool(found.adjoint_growth > 1e8) == is_chaotic
    with pytest.raises(bx.SolveError, match="PersistentES"):
        bx.hypergradient(
            chaotic_problem(),
            jnp.array([0.2, 0.3]),
            jnp.array(3.9),
            inner_solver=solver,
            rule=bx.Unrolled(num_steps=200, checkpoints=checkpoints),
        )


def test_growth_is_the_mean_norm_of_the_adjoint():
    # one variable, x_{k+1} = 0.9 x_k: the adjoint before step k is 0.9^(K - k)
    problem = bx.Bilevel(lambda x, theta: 0.05 * x**2 + 0 * theta * x, lambda x, theta: x)
    factors = 0.9 ** np.arange(1, 11)
    for checkpoints in (10, 3):
        rule = bx.Unrolled(checkpoints=checkpoints)
        one, zero = jnp.array(1.0), jnp.array(0.0)
        found = estimate(rule, 10, optax.sgd(1.0), problem, one, zero)
        if checkpoints == 3:  # tapped at every step
            np.testing.assert_allclose(found.adjoint_growth, factors.mean(), rtol=1e-12)
        else:  # tapped at every segment
            assert 0.9**10 < float(found.adjoint_growth) < 0.9
    assert bx.hypergradient(problem, one, zero)[0].adjoint_growth is None


@pytest.mark.parametrize("max_growth", [0.0, -1.0, "many", True])
def test_growth_limits_that_are_none(max_growth):
    with pytest.raises(ValueError, match="max_growth"):
        bx.Unrolled(max_growth=max_growth)
