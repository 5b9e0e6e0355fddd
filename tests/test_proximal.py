"""Inner problems with penalties and sets, against closed forms, differences and other solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import ElasticNet, Lasso

import bilevax as bx

RANDOM = np.random.default_rng(0)
SIZE = 12
X = RANDOM.normal(size=(30, SIZE))
Y = X[:, [0, 3, 4, 5]] @ np.array([2.0, -1.5, 1.0, 1.2]) + 0.3 * RANDOM.normal(size=30)
SHIFT = RANDOM.normal(size=SIZE)
GROUPS = np.repeat(np.arange(4), 3)
THETA = jnp.array([0.1, 0.3])
TIGHT = bx.ProximalNewton(rtol=1e-11)


def loss(x, theta):
    theta = jnp.atleast_1d(theta)
    residual = X @ jnp.ravel(x) - Y
    return 0.5 * jnp.sum(residual**2) / 30 + 0.01 * jnp.sin(theta[-1]) * jnp.sum(x)


def outer(x, theta):
    return jnp.sum(jnp.sin(jnp.ravel(x) + SHIFT)) + 0.1 * theta @ theta


def soft(z, threshold):
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - threshold, 0)


TERMS = {
    "L1": bx.prox.L1(lambda t: 0.1 * jnp.exp(t[0])),
    "a strength per entry": bx.prox.L1(lambda t: 0.1 * jnp.exp(t[0] + 0.1 * jnp.arange(12.0))),
    "WeightedL1": bx.prox.WeightedL1(
        lambda t: 0.1 * jnp.exp(t[0]), lambda t: jnp.exp(t[1] * jnp.linspace(-1, 1, SIZE))
    ),
    "ElasticNet": bx.prox.ElasticNet(lambda t: 0.1 * jnp.exp(t[0]), lambda t: 0.1 * jnp.exp(t[1])),
    "GroupL2": bx.prox.GroupL2(lambda t: 0.1 * jnp.exp(t[0] * jnp.arange(4.0)), GROUPS),
    "SparseGroup": bx.prox.SparseGroup(
        lambda t: 0.05 * jnp.exp(t[0]), lambda t: 0.1 * jnp.exp(t[1]), GROUPS
    ),
    "Box": bx.prox.Box(lambda t: -0.3 * jnp.exp(t[1]), lambda t: jnp.exp(t[0])),
    "NonNegative": bx.prox.NonNegative(),
    "Simplex": bx.prox.Simplex(lambda t: 2 * jnp.exp(t[0])),
    "L1Ball": bx.prox.L1Ball(lambda t: 2 * jnp.exp(t[0])),
    "L2Ball": bx.prox.L2Ball(lambda t: jnp.exp(t[0])),
    "TotalVariation1D": bx.prox.TotalVariation1D(lambda t: 0.3 * jnp.exp(t[0])),
    "Nuclear": bx.prox.Nuclear(lambda t: 0.3 * jnp.exp(t[0])),
    "Own": bx.prox.Own(
        lambda x, t: 0.1 * jnp.exp(t[0]) * jnp.sum(jnp.abs(x)),
        lambda z, step, t: soft(z, 0.1 * step * jnp.exp(t[0])),
    ),
}
SETS = {"Box", "NonNegative", "Simplex", "L1Ball", "L2Ball"}


def start(name):
    return 0.1 * jnp.ones((4, 3) if name == "Nuclear" else (SIZE,))


# ---- the terms themselves ------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_a_proximal_step_minimises(name):
    """No point near it is better, in the set."""
    term, step = TERMS[name], 0.7
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=start(name).shape))
    x = term.prox(z, step, THETA)

    def objective(x):
        return term.value(x, THETA) + jnp.sum((x - z) ** 2) / (2 * step)

    directions = jnp.asarray(rng.normal(size=(400, *z.shape)))
    sizes = 10.0 ** -jnp.linspace(0, 6, 400).reshape(-1, *[1] * z.ndim)
    near = x[None] + directions * sizes
    if name in SETS:  # what is in the set already is its own projection
        near = jax.vmap(lambda a: term.prox(a, 1.0, THETA))(near)
        np.testing.assert_allclose(term.prox(x, 1.0, THETA), x, atol=1e-14)
    assert float(jnp.min(jax.vmap(objective)(near) - objective(x))) >= -1e-14


@pytest.mark.parametrize("name", TERMS)
def test_a_proximal_step_is_differentiated(name):
    term = TERMS[name]
    rng = np.random.default_rng(2)
    z, d = (jnp.asarray(rng.normal(size=start(name).shape)) for _ in range(2))

    def at(h):
        return term.prox(z + h * d, 0.3, THETA + h)

    _, found = jax.jvp(at, (0.0,), (1.0,))
    np.testing.assert_allclose(found, (at(1e-6) - at(-1e-6)) / 2e-6, atol=1e-8)
    _, back = jax.vjp(at, 0.0)
    assert float(back(d)[0]) == pytest.approx(float(jnp.sum(found * d)), rel=1e-9)


def test_total_variation_against_a_dual_solution():
    """`x = z - D'u`, the dual variable of a box-constrained least-squares problem."""
    from scipy.optimize import lsq_linear

    rng = np.random.default_rng(3)
    z = np.cumsum(rng.normal(size=40)) * 0.3
    D = np.diff(np.eye(40), axis=0)
    for strength in (0.05, 0.4, 2.0):
        u = lsq_linear(D.T, z, (-strength, strength), tol=1e-14, max_iter=1000).x
        x = bx.prox.TotalVariation1D(strength).prox(jnp.asarray(z), 1.0, None)
        np.testing.assert_allclose(x, z - D.T @ u, atol=1e-6)


# Optax' projections promote types. Ours are written anew for the piece, and for strict types.
WEIGHTS = jnp.array([1.0, -2.0, 0.5, 1.0])
Z4 = jnp.array([0.9, 0.4, -0.3, 0.35])
NAMES = ("l1_ball", "l2_ball", "linf_ball", "simplex", "l2_sphere", "halfspace")
PROJECTIONS = {name: getattr(optax.projections, f"projection_{name}") for name in NAMES}
PROJECTIONS["halfspace"] = functools.partial(PROJECTIONS["halfspace"], a=WEIGHTS)


def on_optax_set(name):
    """Nearest to `z + theta`, in units of their own, on the set of size theta."""

    def prox(z, step, theta):
        del step
        size = {"b": theta} if name == "halfspace" else {"scale": theta}
        return PROJECTIONS[name](z, **size)

    def distance(x, theta):
        return 0.5 * jnp.sum(jnp.array([1.0, 2.0, 1.0, 3.0]) * (x - Z4 - 0.1 * theta) ** 2)

    condition = bx.ProximalMinimum(distance, bx.prox.Own(lambda x, t: jnp.zeros(()), prox))
    return bx.Bilevel(condition, lambda x, theta: jnp.sum(jnp.sin(WEIGHTS * x)))


@pytest.mark.parametrize("name", ["l1_ball", "linf_ball", "l2_sphere", "halfspace"])
def test_a_set_of_optax(name):
    problem = on_optax_set(name)

    def at(theta):
        options = {"inner_solver": TIGHT, "throw": False}
        return bx.hypergradient(problem, jnp.full(4, 0.1), theta, **options)[0]

    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(jax.vmap(at))(0.3 + 1e-4 * jnp.arange(-1.0, 2.0))
    assert bool(jnp.all(found.result == bx.RESULTS.successful))
    expected = (found.value[2] - found.value[0]) / 2e-4
    np.testing.assert_allclose(found.grad[1], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["l1_ball", "l2_ball", "simplex"])
def test_our_sets_are_those_of_optax(name):
    """Values and derivatives, on both sides of a kink and inside."""
    term = {"l1_ball": bx.prox.L1Ball, "l2_ball": bx.prox.L2Ball, "simplex": bx.prox.Simplex}[name]

    def ours(z, size):
        return term(lambda t: t).prox(z, 1.0, size)

    for size in (0.2, 0.9 - 0.4, 0.51, 1.7, 2.5):
        primals, tangents = (Z4, jnp.asarray(size)), (WEIGHTS, jnp.asarray(1.0))
        with jax.numpy_dtype_promotion("standard"):
            expected = jax.jvp(PROJECTIONS[name], primals, tangents)
        found = jax.jvp(ours, primals, tangents)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-14)
        if size != 0.9 - 0.4:  # there the second entry leaves zero: one-sided, either side
            np.testing.assert_allclose(found[1], expected[1], atol=1e-13)


def test_a_kink_of_a_set_of_optax():
    wish = jnp.array([1.0, 1.5, 0.7])
    prices = jnp.ones(3)

    def prox(z, step, theta):
        del step
        return optax.projections.projection_halfspace(z, prices, theta)

    def distance(x, theta):
        del theta
        return 0.5 * jnp.sum((x - wish) ** 2)

    condition = bx.ProximalMinimum(distance, bx.prox.Own(lambda x, t: jnp.zeros(()), prox))
    problem = bx.Bilevel(condition, lambda x, theta: jnp.sum(x))
    for budget, name, grad in (
        (3.1, "successful", 1.0),
        (3.2, "at_kink", None),
        (3.3, "successful", 0.0),
    ):
        found, _ = bx.hypergradient(problem, wish, jnp.asarray(budget), throw=False)
        assert found.result == name
        assert grad is None or float(found.grad) == pytest.approx(grad, abs=1e-9)


def test_a_kink_between_two_parts_of_a_model():
    """`a - b <= theta`, entry by entry the same in both parts."""

    def prox(z, step, theta):
        del step
        excess = 0.5 * jnp.maximum(z["a"] - z["b"] - theta, 0)
        return {"a": z["a"] - excess, "b": z["b"] + excess}

    def distance(x, theta):
        del theta
        return 0.5 * (jnp.sum((x["a"] - 1.0) ** 2) + jnp.sum(x["b"] ** 2))

    condition = bx.ProximalMinimum(distance, bx.prox.Own(lambda x, t: jnp.zeros(()), prox))
    problem = bx.Bilevel(condition, lambda x, theta: jnp.sum(x["a"]))
    start = {"a": jnp.ones(3), "b": jnp.zeros(3)}
    for bound, name in ((0.9, "successful"), (1.0, "at_kink"), (1.1, "successful")):
        found, _ = bx.hypergradient(problem, start, jnp.asarray(bound), throw=False)
        assert found.result == name


# ---- hypergradients ------------------------------------------------------------------

# One of each way to say what a piece is: the second derivative follows from that.
TWICE = {"ElasticNet", "SparseGroup", "Box", "Simplex", "L2Ball", "TotalVariation1D"}


@functools.cache
def estimates(name):
    """A function of x0 and theta: the estimate, hypergradient, and a second derivative."""
    problem = bx.Bilevel(bx.ProximalMinimum(loss, TERMS[name]), outer)

    @jax.jit
    def at(x0, theta):
        def grad(theta):
            found, _ = bx.hypergradient(problem, x0, theta, inner_solver=TIGHT, throw=False)
            return found.grad, found

        if name not in TWICE:
            return *reversed(grad(theta)), None
        (grad_, found), (curvature, _) = jax.jvp(grad, (theta,), (jnp.ones_like(theta),))
        return found, grad_, curvature

    return at


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"NonNegative", "a strength per entry"}))
def test_hypergradients_and_their_derivatives_equal_differences(name):
    at = estimates(name)
    found, grad, curvature = at(start(name), THETA)
    assert found.result == bx.RESULTS.successful
    h = 1e-3  # of fourth order: what is left of the inner solve weighs little
    values = [[at(found.x, THETA + k * h * d)[0].value for k in (1, -1, 2, -2)] for d in np.eye(2)]
    expected = [(8 * (a - b) - (c - d)) / (12 * h) for a, b, c, d in values]
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-8)
    if curvature is None:
        return
    ends = [at(found.x, THETA + k * h)[1] for k in (1, -1, 2, -2)]
    expected = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
    np.testing.assert_allclose(curvature, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.02, 0.3])
def test_solutions_are_those_of_scikit_learn(strength):
    for term, other in (
        (bx.prox.L1(strength), Lasso(strength, fit_intercept=False, tol=1e-14)),
        (
            bx.prox.ElasticNet(0.5 * strength, 0.5 * strength),
            ElasticNet(strength, l1_ratio=0.5, fit_intercept=False, tol=1e-14),
        ),
    ):
        x = bx.argmin(bx.ProximalMinimum(loss, term), TIGHT)(jnp.zeros(SIZE), 0 * THETA)
        expected = other.fit(X, Y).coef_
        np.testing.assert_allclose(x, expected, atol=1e-9)
        np.testing.assert_array_equal(x != 0, expected != 0)


def cosines(n, d, s, p):
    i, j = np.meshgrid(np.arange(n), np.arange(d), indexing="ij")
    return np.cos(s * (i + 1) * (j + 1) + p * i)


BETA = np.array([1.5, -2.0, 0, 0, 1, 0, 0, 0])
A, A_VAL = cosines(20, 8, 0.53, 0.11), cosines(15, 8, 0.47, 0.23)
B, B_VAL = (
    A @ BETA + 0.3 * np.sin(1.7 * np.arange(20)),
    A_VAL @ BETA + 0.3 * np.sin(1.1 * np.arange(15)),
)


def half_squares(x, theta, data):
    del theta
    return 0.5 * jnp.sum((data[0] @ x - data[1]) ** 2)


LASSO = bx.Bilevel(
    bx.ProximalMinimum(half_squares, bx.prox.L1(lambda t: jnp.exp(t)), (A, B)),
    half_squares,
    outer_data=(A_VAL, B_VAL),
)
LOG_LARGEST = np.log(21.7834330553)
DIGITS = 1.04019315486


STEPS = bx.ProximalGradient(500)


@pytest.mark.parametrize(
    ("rule", "solver", "bound"),
    [
        (bx.Implicit(), None, 1e-9),
        (bx.Implicit(bx.linear.CG(rtol=1e-12)), None, 1e-9),
        (bx.Implicit(bx.linear.MINRES(rtol=1e-12)), None, 1e-9),
        (
            bx.Implicit(bx.linear.CG(rtol=1e-12), preconditioner=bx.precondition.Jacobi()),
            None,
            1e-9,
        ),
        (bx.MinimumNorm(), None, 1e-9),
        (bx.Polished(), None, 1e-9),
        (bx.Accurate(1e-9), None, 1e-9),
        (bx.KStep(200), None, 1e-9),
        (bx.OneStep(), None, 0.1),
        (bx.JacobianFree(), None, 0.1),
        (bx.Unrolled(), STEPS, 1e-9),
        (bx.ForwardMode(), STEPS, 1e-9),
        (bx.Truncated(300), STEPS, 1e-9),
    ],
    ids=str,
)
def test_every_rule_takes_the_lasso(rule, solver, bound):
    found, _ = bx.hypergradient(LASSO, jnp.zeros(8), jnp.log(2.0), inner_solver=solver, rule=rule)
    assert float(found.grad) == pytest.approx(DIGITS, rel=bound)
    assert float(found.value) == pytest.approx(1.09596540797, rel=1e-8)


def test_the_projection_on_the_simplex():
    z = jnp.array([0.9, 0.4, -0.3, 0.35])
    weights = jnp.array([0.3, -1.0, 0.5, 0.8])
    problem = bx.Bilevel(
        bx.ProximalMinimum(lambda x, z: 0.5 * jnp.sum((x - z) ** 2), bx.prox.Simplex()),
        lambda x, z: weights @ x,
    )
    found, _ = bx.hypergradient(problem, jnp.full(4, 0.25), z)
    np.testing.assert_allclose(found.x, [0.683333, 0.183333, 0, 0.133333], atol=1e-6)
    exact = [0.266666667, -1.033333333, 0, 0.766666667]
    np.testing.assert_allclose(found.grad, exact, atol=1e-8)


# ---- kinks ---------------------------------------------------------------------------


def outcome(problem, x0, theta, **options):
    return bx.hypergradient(problem, x0, theta, throw=False, **options)[0]


def test_an_empty_support_is_no_success():
    for log_strength, name in (
        (LOG_LARGEST - 1e-3, "successful"),
        (LOG_LARGEST + 1e-3, "empty_support"),
        (LOG_LARGEST + 5, "empty_support"),
    ):
        found = outcome(LASSO, jnp.zeros(8), jnp.asarray(log_strength))
        assert found.result == name
        assert (name == "successful") == bool(found.grad != 0)


def test_at_a_kink_and_beside_it():
    """Of `(x - theta)^2 / 2 + |x|` and of a box: the derivative jumps from zero to one."""
    for term, kink in ((bx.prox.L1(1.0), 1.0), (bx.prox.Box(-1.0, 1.0), 1.0)):
        problem = bx.Bilevel(
            bx.ProximalMinimum(lambda x, t: 0.5 * jnp.sum((x - jnp.stack([t, 3 * t])) ** 2), term),
            lambda x, t: jnp.sum(x),
        )
        both = [outcome(problem, jnp.zeros(2), jnp.asarray(kink + h)).grad for h in (-1e-3, 1e-3)]
        assert abs(float(both[1] - both[0])) == pytest.approx(1, rel=1e-6)
        for h in (0.0, 1e-15, -1e-15):
            found = outcome(problem, jnp.zeros(2), jnp.asarray(kink + h))
            assert found.result == bx.RESULTS.at_kink
    with pytest.raises(bx.SolveError, match="one-sided"):
        bx.hypergradient(problem, jnp.zeros(2), jnp.asarray(1.0))


def test_duplicate_columns_share_one_answer():
    """Which of them x uses is open, and the outer objective does not see it."""
    double = tuple(np.concatenate([data, data[:, :1]], axis=1) for data in (A, A_VAL))
    condition = bx.ProximalMinimum(half_squares, bx.prox.L1(lambda t: jnp.exp(t)), (double[0], B))
    problem = bx.Bilevel(condition, half_squares, outer_data=(double[1], B_VAL))
    found = outcome(problem, jnp.zeros(9), jnp.log(2.0))
    if found.result == bx.RESULTS.successful:
        assert float(found.grad) == pytest.approx(DIGITS, rel=1e-6)
    else:
        assert found.result == bx.RESULTS.at_kink


def test_stopped_while_the_support_changes():
    found = outcome(LASSO, jnp.ones(8), jnp.log(2.0), inner_solver=bx.ProximalGradient(2))
    assert found.result == bx.RESULTS.support_not_identified


def test_without_a_penalty_it_is_a_smooth_minimum():
    condition = bx.ProximalMinimum(half_squares, bx.prox.L1(lambda t: 0 * t), (A, B))
    x = bx.argmin(condition)(jnp.zeros(8), jnp.asarray(0.0))
    np.testing.assert_allclose(x, np.linalg.lstsq(A, B)[0], rtol=1e-6)


# ---- programs ------------------------------------------------------------------------


def test_more_features_than_samples_in_single_precision():
    rng = np.random.default_rng(4)
    data = rng.normal(size=(40, 200)).astype(np.float32)
    target = (data[:, :5] @ np.ones(5)).astype(np.float32)
    condition = bx.ProximalMinimum(
        lambda x, t, d: 0.5 * jnp.sum((d[0] @ x - d[1]) ** 2) / 40,
        bx.prox.L1(lambda t: jnp.exp(t)),
        (data, target),
    )
    problem = bx.Bilevel(condition, lambda x, t: jnp.sum((x[:5] - 1) ** 2))
    theta = jnp.float32(-2.0)
    found = outcome(problem, jnp.zeros(200, jnp.float32), theta)
    assert found.result == bx.RESULTS.successful and found.grad.dtype == jnp.float32
    support = np.flatnonzero(found.x)
    part = data[:, support].astype(float)
    signs, strength = np.sign(np.asarray(found.x))[support], np.exp(-2.0)
    x = np.linalg.solve(part.T @ part / 40, part.T @ target / 40 - strength * signs)
    seen = support < 5
    v = np.linalg.solve(part.T @ part / 40, np.where(seen, 2 * (x - 1), 0))
    assert float(found.grad) == pytest.approx(-strength * signs @ v, rel=1e-3)


def test_a_term_for_each_part_of_a_model():
    """Also with settings of theta beside its arrays, and with closures."""
    x0 = {"weights": jnp.zeros(8), "bias": jnp.zeros(())}
    theta = {"log": jnp.log(2.0), "name": "a setting"}

    def value(scale):
        def fn(x, theta, data):
            del theta
            return 0.5 * jnp.sum((data[0] @ x["weights"] + x["bias"] - data[1]) ** 2)

        term = {"weights": bx.prox.L1(lambda t: scale * jnp.exp(t["log"])), "bias": None}
        x = bx.argmin(bx.ProximalMinimum(fn, term, (A, B)), TIGHT)(x0, theta)
        return 0.5 * jnp.sum((A_VAL @ x["weights"] + x["bias"] - B_VAL) ** 2)

    expected = (value(1.0 + 1e-5) - value(1.0 - 1e-5)) / 2e-5
    assert float(jax.grad(value)(1.0)) == pytest.approx(float(expected), rel=1e-6)


def test_what_a_proximal_step_closes_over_is_not_lost():
    def value(scale):
        term = bx.prox.Own(lambda x, t: 0.0 * t, lambda z, step, t: soft(z, step * scale * t))
        return jnp.sum(bx.argmin(bx.ProximalMinimum(loss, term))(jnp.zeros(SIZE), THETA[0]))

    with pytest.raises(TypeError, match="hand it over in theta"):
        jax.grad(value)(1.0)


def test_batches_equal_a_loop():
    def grad(theta):
        return outcome(LASSO, jnp.zeros(8), theta).grad

    thetas = jnp.log(jnp.array([1.0, 2.0, 4.0]))
    loop = jnp.stack([grad(theta) for theta in thetas])
    np.testing.assert_allclose(jax.vmap(grad)(thetas), loop, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(grad)(thetas[1]), loop[1], rtol=1e-9)


def test_the_whole_problem_is_solved_and_diagnosed():
    method = bx.DoubleLoop(optimizer=bx.OuterLBFGS())
    solution = bx.solve(LASSO, jnp.zeros(8), jnp.log(10.0), method, num_steps=20, progress=False)
    assert solution.stats["num_flagged"] == 0
    assert float(solution.value) < 0.9 * float(outcome(LASSO, jnp.zeros(8), jnp.log(10.0)).value)
    report = bx.check(LASSO, solution.x, solution.theta, verbose=False)
    assert report.ok, str(report)
    rules = {"exact": bx.Implicit()}
    compared = bx.compare(LASSO, jnp.zeros(8), solution.theta, rules=rules, verbose=False)
    assert float(compared.rows[0].error) < 1e-6, str(compared)
    advice = bx.recommend(LASSO, jnp.zeros(8), solution.theta)
    assert isinstance(advice.rule, bx.Implicit), str(advice)


def test_what_is_no_term_is_refused():
    for make, error, message in (
        (lambda: bx.ProximalMinimum(loss, 0.1), TypeError, "bx.prox"),
        (lambda: bx.prox.GroupL2(0.1, [0.0, 1.0]), ValueError, "integers"),
        (lambda: bx.prox.Own(1.0, soft), TypeError, "value"),
        (lambda: bx.ProximalGradient(0), ValueError, "num_steps"),
    ):
        with pytest.raises(error, match=message):
            make()
    for term, message in (
        (bx.prox.L1(jnp.ones(3)), "shape of x"),
        (bx.prox.GroupL2(0.1, [0, 1]), "shape of x"),
        (bx.prox.GroupL2(jnp.ones(3), GROUPS), "4 groups"),
        (bx.prox.Nuclear(0.1), "matrices"),
        ({"weights": bx.prox.L1(0.1)}, "like x"),
    ):
        problem = bx.Bilevel(bx.ProximalMinimum(loss, term), outer)
        with pytest.raises((TypeError, ValueError), match=message):
            bx.hypergradient(problem, jnp.zeros(SIZE), THETA)
    problem = bx.Bilevel(bx.ProximalMinimum(loss, bx.prox.L1(0.1)), outer)
    with pytest.raises(TypeError, match="bx.ProximalGradient"):
        solver = bx.Descent(optax.sgd(0.1), num_steps=3)
        bx.hypergradient(problem, jnp.zeros(SIZE), THETA, inner_solver=solver)
    smooth = bx.Bilevel(loss, outer)
    with pytest.raises(TypeError, match="ProximalMinimum"):
        bx.hypergradient(smooth, jnp.zeros(SIZE), THETA, inner_solver=TIGHT)
