"""Gradients from values alone: unbiased, or not, by statistics with fixed seeds."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import relative_error

# One step of gradient descent with rate 1 ends at x = theta exactly, so that L_K(theta) is
# sum_j theta_j^3 and the gradient of its smoothing 3 theta^2 + 3 sigma^2.
CUBIC = bx.Bilevel(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), lambda x, theta: jnp.sum(x**3))
ONE_STEP = bx.Descent(optax.sgd(1.0), num_steps=1)


def estimates(rule, num_repetitions, problem, solver, x0, theta, num_estimates=1, seed=0):
    """Gradients and standard errors, (repetition, estimate, ...), each repetition a key."""

    def repetition(key):
        state, grads, errors = None, [], []
        for _ in range(num_estimates):
            estimate, state = bx.hypergradient(
                problem,
                x0,
                theta,
                inner_solver=solver,
                rule=rule(key),
                state=state,
                throw=False,
            )
            grads.append(estimate.grad)
            errors.append(estimate.error_estimate)
        return jnp.stack(grads), jnp.stack(errors)

    keys = jax.random.split(jax.random.key(seed), num_repetitions)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(repetition))(keys))


def assert_unbiased(samples, expected, num_errors=4.5, resolution=0.05):
    """The mean of `samples` is `expected` to within its standard error, which is small."""
    mean = samples.mean(axis=0)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.all(error < resolution * np.abs(expected))  # or the test could not fail
    assert np.all(np.abs(mean - expected) < num_errors * error)


def test_evolution_strategies_are_unbiased_for_the_smoothed_objective():
    theta = jnp.array([0.7, -1.1])
    sigma = np.array([0.5, 0.8])
    expected = 3 * np.asarray(theta) ** 2 + 3 * sigma**2

    def rule(key):
        return bx.EvolutionStrategies(key, num_pairs=8, sigma=jnp.asarray(sigma))

    grads, errors = estimates(rule, 4_000, CUBIC, ONE_STEP, jnp.zeros(2), theta)
    assert_unbiased(grads[:, 0], expected, resolution=0.03)
    # the smoothing is seen, too: it is many standard errors
    sharp = 3 * np.asarray(theta) ** 2
    error = grads[:, 0].std(axis=0) / np.sqrt(len(grads))
    assert np.all(np.abs(grads[:, 0].mean(axis=0) - sharp) > 10 * error)
    # and the reported standard error is the one observed
    observed = np.sum(grads[:, 0].var(axis=0, ddof=1))
    assert np.mean(errors**2) == pytest.approx(observed, rel=0.1)


# "Influence balancing" (Tallec, Ollivier 2017; Vicol et al. 2021, section 5.1): theta pushes
# one entry up and three down, and the nearest entries up arrive first, so that short windows
# see the wrong sign. The map is linear and the loss quadratic: smoothing changes no gradient.
SIZE, WINDOW, EPISODE = 4, 1, 6
MATRIX = 0.5 * np.eye(SIZE) + 0.5 * np.eye(SIZE, k=1)
PUSH = np.array([1.0, -1.0, -1.0, -1.0])
BALANCE = bx.Bilevel(
    bx.FixedPoint(lambda x, theta: jnp.asarray(MATRIX) @ x + theta * jnp.asarray(PUSH)),
    lambda x, theta: 0.5 * (x[0] - 1.0) ** 2 + 0.1 * theta**2,
)
THETA = jnp.asarray(0.5)


def steps(num_steps):
    # never done: the difference of two iterates does not fall below 1e-300
    return bx.Optimistix(optx.FixedPointIteration(1e-300, 1e-300), max_steps=num_steps)


def balance_gradient():
    """The derivative of the mean over windows of the loss, by the recurrence itself."""
    x, slope, grads = np.ones(SIZE), np.zeros(SIZE), []
    for k in range(1, EPISODE + 1):
        x, slope = MATRIX @ x + float(THETA) * PUSH, MATRIX @ slope + PUSH
        if k % WINDOW == 0:
            grads.append((x[0] - 1.0) * slope[0] + 0.2 * float(THETA))
    return np.array(grads)


def test_persistent_evolution_is_unbiased_and_truncated_evolution_is_not():
    num_windows = EPISODE // WINDOW
    settings = {"num_pairs": 50, "sigma": 0.1}

    def persistent(key):
        return bx.PersistentES(key, num_steps=WINDOW, **settings)

    def truncated(key):
        return bx.EvolutionStrategies(key, **settings)

    expected = balance_gradient()
    run = functools.partial(
        estimates, problem=BALANCE, x0=jnp.ones(SIZE), theta=THETA, num_estimates=num_windows + 1
    )
    grads, _ = run(persistent, 4_000, solver=steps(EPISODE))
    # every window of the episode, and the first of the next
    assert_unbiased(grads, np.append(expected, expected[0]), resolution=0.2)
    assert_unbiased(grads[:, :num_windows].mean(axis=1), expected.mean())
    # From the same x, windows that forget where x came from are far off, and of wrong sign.
    short, _ = run(truncated, 400, solver=steps(WINDOW))
    episodes = short[:, :num_windows].mean(axis=1)
    error = episodes.std(ddof=1) / np.sqrt(len(episodes))
    assert abs(episodes.mean() - expected.mean()) > 30 * error
    assert np.sign(episodes.mean()) == -np.sign(expected.mean())
    # Whole solves by evolution strategies agree with the last window.
    whole, _ = estimates(truncated, 400, BALANCE, steps(EPISODE), jnp.ones(SIZE), THETA)
    assert_unbiased(whole[:, 0], expected[-1])


MOMENTUM = optax.sgd(0.2, momentum=0.8)


@functools.cache  # the same functions: programs are shared
def quadratic(dtype=float):
    scale = jnp.asarray([1.0, 2.0, 0.5], dtype)
    problem = bx.Bilevel(
        lambda x, theta: (
            0.5 * jnp.sum(scale * (x["w"] - theta["a"]) ** 2) + theta["b"] * x["c"] ** 2
        ),
        lambda x, theta: (jnp.sum(x["w"] ** 2) + x["c"] + theta["b"] ** 2, x["c"]),
    )
    x0 = {"w": jnp.ones(3, dtype), "c": jnp.asarray(2.0, dtype)}
    theta = {"a": jnp.asarray([0.3, -0.2, 0.8], dtype), "b": jnp.asarray(1.0, dtype)}
    return problem, x0, theta


def test_windows_are_one_solve_with_its_momentum():
    problem, x0, theta = quadratic()
    rule = bx.PersistentES(jax.random.key(1), num_steps=4, num_pairs=2)
    state, seen = None, []
    for _ in range(4):
        estimate, state = bx.hypergradient(
            problem, x0, theta, inner_solver=bx.Descent(MOMENTUM, 12), rule=rule, state=state
        )
        seen.append(estimate)
        if len(seen) == 3:  # at the end of an episode
            zeros = jax.tree.map(jnp.zeros_like, (state.rule.carries, state.rule.sums))
            first_rule = eqx.tree_at(lambda r: (r.carries, r.sums), state.rule, zeros)
    for window, estimate in enumerate(seen):
        num_steps = 4 * (window % 3 + 1)  # the fourth begins a new episode
        whole, _ = bx.hypergradient(
            problem, x0, theta, inner_solver=bx.Descent(MOMENTUM, num_steps), rule=bx.Unrolled()
        )
        assert relative_error(estimate.x, whole.x) < 1e-12
        assert float(estimate.value) == pytest.approx(float(whole.value), rel=1e-12)
        assert float(estimate.inner_residual) == pytest.approx(float(whole.inner_residual))
        assert int(estimate.stats["num_inner_steps"]) == 4
        assert int(estimate.stats["num_gradients"]) == 4 * 5
    assert relative_error(seen[3].grad, seen[0].grad) > 1e-3  # other perturbations
    # The fourth knows nothing of the first three but the number of perturbations drawn.
    fresh = eqx.tree_at(lambda s: s.rule, state, first_rule)
    again, _ = bx.hypergradient(
        problem, x0, theta, inner_solver=bx.Descent(MOMENTUM, 12), rule=rule, state=fresh
    )
    assert relative_error(again.grad, seen[3].grad) < 1e-12


RULES = {
    "ES": bx.EvolutionStrategies(jax.random.key(1), num_pairs=200, sigma={"a": 1e-3, "b": 2e-3}),
    "ES in batches": bx.EvolutionStrategies(
        jax.random.key(1), num_pairs=200, sigma={"a": 1e-3, "b": 2e-3}, batch_size=32
    ),
    "PES": bx.PersistentES(
        jax.random.key(1), num_steps=12, num_pairs=200, sigma={"a": 1e-3, "b": 2e-3}
    ),
    "PES in batches": bx.PersistentES(
        jax.random.key(1), num_steps=12, num_pairs=200, sigma={"a": 1e-3, "b": 2e-3}, batch_size=32
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_pytrees_precisions_and_parameters_of_the_optimiser(rule):
    rule = RULES[rule]

    def start(theta):
        return {"w": jnp.ones_like(theta["a"]), "c": 2 * theta["b"]}

    for dtype in (jnp.float64, jnp.float32) if rule.batch_size is None else (jnp.float64,):
        problem, _, theta = quadratic(dtype)
        learned = bx.Descent(lambda theta: optax.sgd(0.2 * theta["b"]), num_steps=12)
        settings = {"inner_solver": learned}
        estimate, _ = bx.hypergradient(problem, start, theta, rule=rule, **settings)
        exact, _ = bx.hypergradient(problem, start, theta, rule=bx.Unrolled(), **settings)
        difference = jax.tree.map(jnp.subtract, estimate.grad, exact.grad)
        distance = float(optx.two_norm(difference))
        assert 0.3 < distance / float(estimate.error_estimate) < 3  # honest
        assert distance < 0.35 * float(optx.two_norm(exact.grad))
        assert estimate.aux.dtype == dtype
        leaves = jax.tree.leaves((estimate.grad, estimate.x, estimate.value))
        assert all(a.dtype == dtype and not a.weak_type for a in leaves)


@pytest.mark.parametrize(
    "rule",
    [
        bx.EvolutionStrategies(jax.random.key(1), num_pairs=20),
        bx.PersistentES(jax.random.key(1), num_steps=6, num_pairs=20),
    ],
    ids=["ES", "PES"],
)
def test_solve(rule):
    problem, x0, theta = quadratic()
    method = bx.DoubleLoop(bx.Descent(MOMENTUM, 12), rule, optax.adam(0.05))
    solution = bx.solve(problem, x0, theta, method, num_steps=60, progress=False)
    assert solution.result == bx.RESULTS.successful
    assert np.all(np.asarray(solution.history.error_estimate) > 0)
    norms = np.asarray(solution.history.hypergradient_norm)
    assert len(np.unique(norms)) == len(norms)  # new perturbations at every step
    values = np.asarray(solution.history.value)
    assert np.mean(values[-6:]) < 0.3 * np.mean(values[:6])


def test_a_warm_start_compiles_nothing():
    problem, x0, theta = quadratic()
    optimistix = bx.Optimistix(optx.OptaxMinimiser(MOMENTUM, 1e-9, 1e-9), 12)
    for solver in (bx.Descent(MOMENTUM, 12), optimistix):
        seen = set()
        for key, sigma in enumerate((0.1, 0.2)):
            rule = bx.PersistentES(jax.random.key(key), num_steps=4, num_pairs=2, sigma=sigma)
            state = None
            for _ in range(3):
                _, state = bx.hypergradient(
                    problem, x0, theta, inner_solver=solver, rule=rule, state=state
                )
                seen.add(num_compilations())
        assert len(seen) == 1  # all within the first call


def num_compilations():
    return bx._hypergradient._entry._estimate.num_compilations()


def logistic_map(rate, x, num_steps):
    for _ in range(num_steps):
        x = rate * x * (1 - x)
    return x


def test_a_chaotic_inner_problem():
    """200 steps of the logistic map: the derivative explodes, the smoothed objective has one."""
    rate, sigma, num_steps = 3.75, 0.03, 200
    starts = np.linspace(0.2, 0.8, 30)
    problem = bx.Bilevel(
        bx.FixedPoint(lambda x, theta: theta * x * (1 - x)), lambda x, theta: jnp.mean(x)
    )
    settings = {"inner_solver": steps(num_steps), "throw": False}
    where = jnp.asarray(starts), jnp.asarray(rate)
    exact, _ = bx.hypergradient(problem, *where, rule=bx.Unrolled(), **settings)
    assert abs(float(exact.grad)) > 1e10
    # the smoothed gradient by quadrature: the mean over z of z L(rate + sigma z) / sigma
    z = np.linspace(-5, 5, 20_001)
    density = np.exp(-(z**2) / 2) / np.sum(np.exp(-(z**2) / 2))
    values = logistic_map((rate + sigma * z)[:, None], starts[None, :], num_steps).mean(axis=1)
    smoothed = np.sum(density * z * values) / sigma
    assert smoothed < -0.1
    rule = bx.EvolutionStrategies(jax.random.key(5), num_pairs=4_000, sigma=sigma)
    estimate, _ = bx.hypergradient(problem, *where, rule=rule, **settings)
    assert estimate.result == bx.RESULTS.successful
    error = float(estimate.error_estimate)
    assert error < 0.2 * abs(smoothed)
    assert abs(float(estimate.grad) - smoothed) < 4 * error


def test_particles_that_are_not_finite_are_flagged():
    problem = bx.Bilevel(
        lambda x, theta: jnp.sum((x - jnp.sqrt(theta)) ** 2), lambda x, theta: jnp.sum(x**2)
    )
    where = jnp.zeros(1), jnp.asarray(0.01)  # perturbed below zero
    solver = bx.Descent(optax.sgd(0.1), 4)
    for rule in (
        bx.EvolutionStrategies(jax.random.key(0), sigma=1.0),
        bx.PersistentES(jax.random.key(0), num_steps=2, sigma=1.0),
    ):
        estimate, state = bx.hypergradient(
            problem, *where, inner_solver=solver, rule=rule, throw=False
        )
        assert estimate.result == bx.RESULTS.nonfinite
        assert np.isfinite(estimate.value)
        with pytest.raises(bx.SolveError, match="NaN"):
            bx.hypergradient(problem, *where, inner_solver=solver, rule=rule)
    assert int(state.rule.window) == 0  # a new episode begins


def test_mistakes_are_named():
    problem, x0, theta = quadratic()
    key, solver = jax.random.key(0), bx.Descent(MOMENTUM, 12)
    run = functools.partial(bx.hypergradient, problem, x0, theta)
    for rule in (bx.EvolutionStrategies(key), bx.PersistentES(key, num_steps=3)):
        with pytest.raises(TypeError, match=r"bx.hypergradient.*bx.solve"):
            bx.argmin(lambda x, t: (x - t) ** 2, solver, rule)(jnp.zeros(()), jnp.zeros(()))
        with pytest.raises(TypeError, match=r"bx.hypergradient.*bx.solve"):
            optx.minimise(
                lambda x, t: (x - t) ** 2, optx.BFGS(1e-3, 1e-3), jnp.zeros(()), 1.0, adjoint=rule
            )
        _, other = run(inner_solver=solver, rule=bx.Unrolled())
        with pytest.raises(ValueError, match="does not come from"):
            run(inner_solver=solver, rule=rule, state=other)
        with pytest.raises(TypeError, match=r"bx.Given|has none"):
            run(inner_solver=bx.Given(), rule=rule)
    _, other = run(inner_solver=solver, rule=bx.PersistentES(key, num_steps=3, num_pairs=7))
    with pytest.raises(ValueError, match="another number of pairs"):
        run(inner_solver=solver, rule=rule, state=other)
    with pytest.raises(ValueError, match="12 steps and PersistentES.num_steps=5"):
        run(inner_solver=solver, rule=bx.PersistentES(key, num_steps=5))
    for sigma in ({"a": 0.1}, {"a": jnp.ones(2), "b": 0.1}, jnp.ones(3)):
        with pytest.raises(ValueError, match="one number or a pytree like theta"):
            run(inner_solver=solver, rule=bx.EvolutionStrategies(key, sigma=sigma))
    for sigma in (0.0, -0.1, jnp.array([0.1, jnp.nan])):
        with pytest.raises(ValueError, match="must be positive"):
            bx.EvolutionStrategies(key, sigma=sigma)
    with pytest.raises(TypeError, match="must be a float"):
        bx.EvolutionStrategies(key, sigma=1)
    with pytest.raises(TypeError, match="one random key"):
        bx.EvolutionStrategies(0)
    with pytest.raises(ValueError, match="num_pairs"):
        bx.PersistentES(key, num_steps=3, num_pairs=0)


def test_a_start_that_depends_on_theta_needs_cold_starts():
    problem, _, theta = quadratic()

    def start(theta):
        return {"w": theta["a"], "c": theta["b"]}

    rule = bx.PersistentES(jax.random.key(0), num_steps=6, num_pairs=4)
    solver = bx.Descent(MOMENTUM, 12)
    _, state = bx.hypergradient(problem, start, theta, inner_solver=solver, rule=rule)
    with pytest.raises(ValueError, match="use bx.solve|Use bx.solve"):
        bx.hypergradient(problem, start, theta, inner_solver=solver, rule=rule, state=state)
    method = bx.DoubleLoop(solver, rule)
    solution = bx.solve(problem, start, theta, method, num_steps=3, progress=False)
    assert solution.result == bx.RESULTS.successful
