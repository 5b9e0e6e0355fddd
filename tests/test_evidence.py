"""What an estimate says of its own error: estimate, bound, polish, bias, accuracy on demand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._hypergradient._base import Query
from bilevax._hypergradient._point import point
from bilevax.testing import all_oracles, fixed_point, logistic, relative_error, root

ORACLE = logistic()
THETA = ORACLE.theta


def modulus(theta):
    """Of the regulariser `sum exp(theta_j) x_j^2 / 2`; the loss is convex."""
    return jnp.min(jnp.exp(theta))


CERTIFIED = bx.Bilevel(
    bx.Minimum(ORACLE.problem.inner.fn, ORACLE.problem.inner.data, modulus),
    ORACLE.problem.outer,
    outer_data=ORACLE.problem.outer_data,
)
ANY = bx.Given(rtol=1.0)  # every x is a solution


def at_distance(distance, rule=bx.Implicit()):  # noqa: B008
    """The estimate at an x that far from the solution."""
    direction = np.cos(1.0 + np.arange(6))
    x = jnp.asarray(ORACLE.x_star + distance * direction / np.linalg.norm(direction))
    return bx.hypergradient(CERTIFIED, x, THETA, inner_solver=ANY, rule=rule)[0]


def error(estimate):
    return float(np.linalg.norm(np.asarray(estimate.grad) - ORACLE.hypergradient))


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_estimate_and_bound_of_an_inexact_x(distance):
    estimate = at_distance(distance, bx.Implicit(error_estimate=True))
    assert error(estimate) > 1e-3 * distance  # there is something to estimate
    assert 0.8 < float(estimate.error_estimate) / error(estimate) < 1.25
    assert error(estimate) <= estimate.error_bound < 3e3 * error(estimate)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_estimate_and_bound_of_an_inexact_adjoint(num_steps):
    rule = bx.Implicit(bx.linear.CG(num_steps=num_steps), error_estimate=True)
    x = jnp.asarray(ORACLE.x_star)
    estimate, _ = bx.hypergradient(CERTIFIED, x, THETA, inner_solver=ANY, rule=rule)
    assert float(estimate.error_estimate) == pytest.approx(error(estimate), rel=1e-3)
    assert error(estimate) <= estimate.error_bound


def test_polish_squares_the_error_of_x():
    errors = [error(at_distance(distance, bx.Polished())) for distance in (1e-2, 1e-4)]
    assert errors[0] < 1e-5 and errors[1] <= 1e-7
    assert errors[1] < 1e-3 * errors[0]  # second order: 1e-4
    polished, plain = at_distance(1e-2, bx.Polished()), at_distance(1e-2)
    assert polished.inner_residual < 1e-2 * plain.inner_residual
    assert abs(polished.value - ORACLE.value) < 1e-2 * abs(plain.value - ORACLE.value)


def test_dual_value_is_of_second_order():
    errors = []
    for distance in (1e-2, 1e-3):
        estimate = at_distance(distance)
        assert abs(estimate.dual_value - ORACLE.value) < 0.3 * abs(estimate.value - ORACLE.value)
        errors.append(abs(float(estimate.dual_value - ORACLE.value)))
    assert errors[1] < 0.02 * errors[0]


def test_without_a_modulus_there_is_no_bound_and_without_asking_no_estimate():
    estimate, _ = bx.hypergradient(ORACLE.problem, ORACLE.x0, THETA)
    assert estimate.error_bound is None and estimate.error_estimate is None
    assert estimate.damping_bias is None and estimate.adjoint_growth is None
    unrolled, _ = bx.hypergradient(
        ORACLE.problem,
        ORACLE.x0,
        THETA,
        inner_solver=bx.Descent(optax.sgd(0.5), 5),
        rule=bx.Unrolled(),
    )
    assert unrolled.error_bound is None and unrolled.dual_value is None
    assert unrolled.best_value == unrolled.value


def test_an_x_outside_the_basin_of_newton_has_no_estimate():
    problem = bx.Bilevel(lambda x, t: jnp.sqrt(1 + (x - t) ** 2), lambda x, t: x**2)
    rule = bx.Implicit(error_estimate=True)
    estimate, _ = bx.hypergradient(
        problem, jnp.array(3.0), jnp.array(0.0), inner_solver=bx.Given(rtol=1e3), rule=rule
    )
    assert np.isinf(estimate.error_estimate)


def test_bias_of_damping():
    damping = 1e-2
    rule = bx.Implicit(bx.linear.CG(rtol=1e-12), damping=damping)
    estimate, _ = bx.hypergradient(
        ORACLE.problem, ORACLE.x0, THETA, inner_solver=bx.NewtonCG(rtol=1e-12), rule=rule
    )
    x, inner = jnp.asarray(ORACLE.x_star), ORACLE.problem.inner
    A = jax.hessian(inner)(x, THETA)
    b = jax.grad(lambda x: ORACLE.problem.outer_value(x, THETA)[0])(x)
    v = jnp.linalg.solve(A + damping * jnp.eye(6), b)
    assert relative_error(estimate.v, v) < 1e-9
    # the leading term: the next one is damping / (smallest eigenvalue) of it
    assert float(estimate.damping_bias) == pytest.approx(error(estimate), rel=0.1)
    assert estimate.result == bx.RESULTS.successful and estimate.adjoint_residual < 1e-10


@pytest.mark.parametrize("rtol", [1e-1, 1e-4, 1e-8])
def test_accuracy_on_demand(rtol):
    rule = bx.Accurate(jnp.asarray(rtol))
    estimate, state = bx.hypergradient(CERTIFIED, ORACLE.x0, THETA, rule=rule)
    norm = np.linalg.norm(ORACLE.hypergradient)
    assert error(estimate) <= rtol * norm
    assert error(estimate) <= float(estimate.error_estimate) <= rtol * norm
    assert error(estimate) <= estimate.error_bound
    warm, _ = bx.hypergradient(CERTIFIED, ORACLE.x0, THETA, rule=rule, state=state)
    assert warm.stats["num_gradients"] <= estimate.stats["num_gradients"]


CONDITIONS = {"nested", "data_weights", "least_squares", "scalar_root", "fixed_point", "root"}


@pytest.mark.parametrize(
    "oracle",
    [oracle for oracle in all_oracles() if oracle.name in CONDITIONS],
    ids=lambda oracle: oracle.name,
)
def test_accuracy_on_demand_for_every_condition(oracle):
    estimate, _ = bx.hypergradient(oracle.problem, oracle.x0, oracle.theta, rule=bx.Accurate(1e-9))
    assert relative_error(estimate.grad, oracle.hypergradient) < 1e-9


def test_accuracy_is_coarser_where_less_is_asked():
    coarse, fine = (
        bx.hypergradient(ORACLE.problem, ORACLE.x0, THETA, rule=bx.Accurate(jnp.asarray(r)))[0]
        for r in (1e-1, 1e-10)
    )
    assert coarse.inner_tolerance > 10 * fine.inner_tolerance
    assert coarse.adjoint_tolerance > 10 * fine.adjoint_tolerance
    assert coarse.stats["num_gradients"] < fine.stats["num_gradients"]


def large(dtype):
    """A quadratic in 300 variables, more than are factorised, of condition number 1e4."""
    random = np.random.default_rng(0)
    q, _ = np.linalg.qr(random.normal(size=(300, 300)))
    A = (q * np.logspace(-4, 0, 300)) @ q.T
    B, target = random.normal(size=(300, 2)), random.normal(size=300)
    theta = np.array([1.0, -2.0])
    A, B, target = (np.asarray(np.asarray(a, dtype), float) for a in (A, B, target))
    x = np.linalg.solve(A, B @ theta)
    exact = B.T @ np.linalg.solve(A, x - target)
    data = tuple(jnp.asarray(a, dtype) for a in (A, B, target))

    def inner(x, theta, data):
        return 0.5 * x @ (data[0] @ x) - x @ (data[1] @ theta)

    def outer(x, theta, data):
        return 0.5 * jnp.sum((x - data[2]) ** 2)

    problem = bx.Bilevel(inner, outer, data, data)
    return problem, jnp.zeros(300, dtype), jnp.asarray(theta, dtype), exact


def test_accuracy_on_demand_by_conjugate_gradients():
    problem, x0, theta, exact = large(jnp.float64)
    for rtol in (1e-1, 1e-3, 1e-6):
        rule = bx.Accurate(jnp.asarray(rtol))
        estimate, _ = bx.hypergradient(problem, x0, theta, rule=rule)
        assert relative_error(estimate.grad, exact) <= rtol


def test_systems_that_are_not_solved_have_their_own_outcome():
    problem, x0, theta, _ = large(jnp.float64)
    rule = bx.Accurate(jnp.asarray(1e-6), linear_solver=bx.linear.CG(max_steps=5))
    estimate, _ = bx.hypergradient(problem, x0, theta, rule=rule, throw=False)
    assert estimate.result == bx.RESULTS.adjoint_not_converged


def test_more_than_float32_can_give_is_flagged():
    problem, x0, theta, exact = large(jnp.float32)
    for rtol in (1e-1, 1e-6):
        rule = bx.Accurate(jnp.asarray(rtol, jnp.float32))
        estimate, _ = bx.hypergradient(problem, x0, theta, rule=rule, throw=False)
        if rtol < 1e-5:
            assert estimate.result != bx.RESULTS.successful
        elif estimate.result == bx.RESULTS.successful:
            assert relative_error(estimate.grad, exact) <= rtol


def test_the_error_of_a_solver_that_cannot_be_told_is_removed_by_newton():
    # twenty steps of descent and no tolerance: x is off by per cents
    solver = bx.Descent(optax.sgd(0.5), 20)
    rule = bx.Accurate(1e-6)
    estimate, _ = bx.hypergradient(ORACLE.problem, ORACLE.x0, THETA, inner_solver=solver, rule=rule)
    assert relative_error(estimate.grad, ORACLE.hypergradient) < 1e-6


@pytest.mark.parametrize("oracle", [fixed_point(), root()], ids=lambda oracle: oracle.name)
def test_evidence_of_equations(oracle):
    x = jax.tree_util.tree_map(lambda a: jnp.asarray(a) * (1 + 1e-4), oracle.x_star)
    plain, polished = (
        bx.hypergradient(oracle.problem, x, oracle.theta, inner_solver=ANY, rule=rule)[0]
        for rule in (bx.Implicit(error_estimate=True), bx.Polished())
    )
    flat = [
        np.concatenate([np.ravel(a) for a in jax.tree_util.tree_leaves(t)])
        for t in (plain.grad, polished.grad, oracle.hypergradient)
    ]
    true_error = np.linalg.norm(flat[0] - flat[2])
    assert float(plain.error_estimate) == pytest.approx(true_error, rel=0.05)
    assert np.linalg.norm(flat[1] - flat[2]) < 1e-3 * true_error


def test_evidence_compiles_once_for_new_tolerances():
    from bilevax._hypergradient._entry import _estimate

    for rtol in (1e-2, 1e-3):
        rule = bx.Accurate(jnp.asarray(rtol))
        _, state = bx.hypergradient(ORACLE.problem, ORACLE.x0, THETA, rule=rule)
        before = _estimate.num_compilations()
        bx.hypergradient(ORACLE.problem, ORACLE.x0, THETA, rule=rule, state=state)
        assert _estimate.num_compilations() == before


def test_the_primal_is_not_recomputed_in_the_krylov_loop():
    """By the compiler's own count of operations, which takes the body of a loop once."""
    data = jnp.asarray(np.random.default_rng(0).normal(size=(400, 50)))

    def inner(x, theta):
        return jnp.sum(jnp.logaddexp(0, data @ x)) + 0.5 * jnp.exp(theta) * jnp.sum(x**2)

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 1) ** 2))
    x, theta = jnp.ones(50), jnp.array(0.0)

    def flops(rule):
        def run(x, theta):
            query = Query(problem, ANY, x, theta)
            return rule.estimate(query, rule.init(query))[0].grad

        return jax.jit(run).lower(x, theta).compile().cost_analysis()["flops"]

    # The Neumann series of two terms and of three are loops too; unrolled by hand:
    def by_hand(x, theta):
        here = point(problem, x, theta)
        return here.at.both(here.grad_x)[1]

    without_loop = jax.jit(by_hand).lower(x, theta).compile().cost_analysis()["flops"]
    product = 2 * 2 * 400 * 50  # two products with the data, two operations an entry
    # `Given` measures its residual by one gradient and one product: four of these halves.
    measured = 2 * product
    loop = flops(bx.Implicit(bx.linear.CG(num_steps=10))) - without_loop - measured
    assert loop < 1.5 * product


def test_refused_at_once():
    with pytest.raises(ValueError, match="damping_bias"):
        bx.Implicit(damping=0.1, error_estimate=True)
    with pytest.raises(TypeError, match=r"bx.Accurate\(rtol\)"):
        bx.Implicit(rtol=1e-3)
    with pytest.raises(TypeError, match="bx.Polished"):
        bx.Implicit(polish=True)
    with pytest.raises(TypeError, match="must be one of bx.linear"):
        bx.Accurate(1e-3, linear_solver=bx.NewtonCG())
    with pytest.raises(ValueError, match="must not be negative"):
        bx.Accurate(-1.0)
    with pytest.raises(ValueError, match="strong_convexity"):
        bx.Minimum(lambda x, t: x, strong_convexity=-1.0)
    with pytest.raises(TypeError, match="strong_convexity"):
        bx.Minimum(lambda x, t: x, strong_convexity="convex")


def test_the_modulus_sees_theta_as_the_user_wrote_it():
    def inner(x, theta):
        return jnp.sum((x - 1) ** 2) + 0.5 * theta["strength"] * jnp.sum(x**2)

    condition = bx.Minimum(inner, strong_convexity=lambda t: 2 + t["strength"])
    problem = bx.Bilevel(condition, lambda x, t: jnp.sum(x**2))
    theta = {"strength": jnp.array(0.5), "name": "ridge"}
    estimate, _ = bx.hypergradient(
        problem, jnp.full(3, 0.5), theta, inner_solver=bx.Given(rtol=1.0)
    )
    x = 2 / 2.5
    exact = 3 * 2 * x * (-x / 2.5)
    assert abs(estimate.grad["strength"] - exact) <= estimate.error_bound < 100


def test_several_outer_objectives_at_once():
    def objectives(x, theta, data):
        value, _ = ORACLE.problem.outer_value(x, theta)
        return jnp.stack([value, jnp.sum(x**2), theta[0] * x[1]]), "aux"

    problem = bx.Bilevel(ORACLE.problem.inner, objectives, outer_data=ORACLE.problem.outer_data)
    solver = bx.NewtonCG(rtol=1e-12)
    for rule in (None, bx.Implicit(bx.linear.CG(rtol=1e-12))):
        several = bx.hypergradients(problem, ORACLE.x0, THETA, inner_solver=solver, rule=rule)
        assert several.grad.shape == (3, 6) and several.aux == "aux"
        assert relative_error(several.grad[0], ORACLE.hypergradient) < 1e-9
        for i in (1, 2):
            one = bx.Bilevel(ORACLE.problem.inner, lambda x, t, i=i: objectives(x, t, None)[0][i])
            single, _ = bx.hypergradient(one, ORACLE.x0, THETA, inner_solver=solver)
            assert relative_error(several.grad[i], single.grad) < 1e-8
    with pytest.raises(TypeError, match="vector of objectives"):
        bx.hypergradients(ORACLE.problem, ORACLE.x0, THETA)
    with pytest.raises(TypeError, match="without error_estimate"):
        bx.hypergradients(problem, ORACLE.x0, THETA, rule=bx.Polished())


def test_a_scalar_fixed_point_in_float32():
    problem = bx.Bilevel(bx.FixedPoint(lambda x, t: 0.5 * jnp.cos(x) + t), lambda x, t: x**2)
    solver = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)
    x0, theta = jnp.array(0.0, jnp.float32), jnp.array(0.3, jnp.float32)
    estimate, _ = bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=bx.Accurate(1e-3))
    x = 0.7
    for _ in range(100):
        x = 0.5 * np.cos(x) + 0.3
    assert float(estimate.grad) == pytest.approx(2 * x / (1 + 0.5 * np.sin(x)), rel=1e-3)


def test_what_a_rule_does_not_know_is_none():
    steps = bx.Descent(optax.sgd(0.1), 300)
    adjoint = {"adjoint_residual", "dual_value"}
    fields = adjoint | {"adjoint_tolerance", "error_estimate", "error_bound", "damping_bias", "v"}
    for rule, solver, known in (
        (bx.Implicit(), None, adjoint | {"adjoint_tolerance", "v"}),
        # by tangents there is no `v`
        (bx.MinimumNorm(), None, {"adjoint_residual", "adjoint_tolerance"}),
        (bx.MinimumNorm(max_tangents=1), None, adjoint | {"adjoint_tolerance", "v"}),
        (bx.SAMA(), steps, adjoint | {"error_estimate", "v"}),
        (bx.KStep(5), steps, {"adjoint_residual", "error_estimate"}),
        (bx.Unrolled(), steps, {"error_estimate"}),
    ):
        estimate, _ = bx.hypergradient(
            ORACLE.problem, ORACLE.x0, THETA, inner_solver=solver, rule=rule, throw=False
        )
        found = {name for name in fields if getattr(estimate, name) is not None}
        assert found == known, type(rule).__name__
        for name in known - {"v"}:
            assert not np.isnan(getattr(estimate, name)), (type(rule).__name__, name)
        if "dual_value" in known:
            x, inner = estimate.x, ORACLE.problem.inner
            right = estimate.value - estimate.v @ jax.grad(inner)(x, THETA)
            assert float(estimate.dual_value) == pytest.approx(float(right), rel=1e-12)
