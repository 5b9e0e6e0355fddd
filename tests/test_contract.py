"""One contract over every rule, condition and solver that claim to work together."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._hypergradient._entry import _estimate
from bilevax.testing import all_oracles, quadratic, quadratic_game, relative_error


@functools.cache
def oracles(dtype):
    return {oracle.name: oracle for oracle in all_oracles(jnp.dtype(dtype))}


NAMES = [oracle.name for oracle in all_oracles(jnp.float64)]
REGULAR = [name for name in NAMES if name != "overparameterised"]


def is_minimum(oracle):
    return isinstance(oracle.problem.inner, bx.Minimum | bx.LeastSquares)


def tight(oracle, dtype="float64"):
    """The default solvers for a condition with tolerances near the floor of the dtype."""
    tolerance = 1e-11 if dtype == "float64" else 3e-6
    if is_minimum(oracle):
        return bx.NewtonCG(rtol=tolerance), bx.Implicit(bx.linear.CG(rtol=tolerance))
    solver = optx.Newton if oracle.kind == "root" else optx.FixedPointIteration
    return solver(rtol=tolerance, atol=tolerance), bx.Implicit()


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-8), ("float32", 1e-4)])
def test_implicit_is_right_on_every_oracle(name, dtype, bound):
    oracle = oracles(dtype)[name]
    solver, rule = tight(oracle, dtype)
    if not is_minimum(oracle):
        rule = bx.Implicit(lx.GMRES(rtol=bound / 100, atol=bound / 100))
    estimate, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=rule, throw=False
    )
    # In float32 a tolerance near the floor may not be met: then it must be said.
    assert dtype == "float32" or estimate.result == bx.RESULTS.successful
    assert estimate.result in (bx.RESULTS.successful, bx.RESULTS.stalled)
    assert relative_error(estimate.grad, oracle.hypergradient) < bound
    assert relative_error(estimate.value, oracle.value) < bound
    assert relative_error(estimate.x, oracle.x_star) < 30 * bound
    assert relative_error(estimate.v, oracle.v_star) < 30 * bound
    assert all(
        a.dtype == jnp.dtype(dtype) and not a.weak_type
        for a in jax.tree_util.tree_leaves((estimate.grad, estimate.x, estimate.v))
        if eqx.is_array(a)
    )


# The defaults depend on the condition and on the size. Of the minima a scalar, a tree, and one
# that moves with the weights of its data.
MINIMA = ["scalar_game", "nested", "data_weights"]
OTHERS = ["least_squares", "scalar_root", "fixed_point", "root"]


@pytest.mark.parametrize("name", [*MINIMA, *OTHERS])
def test_defaults_need_no_choices(name):
    oracle = oracles("float64")[name]
    estimate, _ = bx.hypergradient(oracle.problem, oracle.x0, oracle.theta)
    assert estimate.result == bx.RESULTS.successful
    assert relative_error(estimate.grad, oracle.hypergradient) < 1e-4


INNER_SOLVERS = {
    "NewtonCG": bx.NewtonCG(rtol=1e-11, dense=False),
    "NewtonCG dense": bx.NewtonCG(rtol=1e-11, dense=True),
    "LBFGS": bx.LBFGS(rtol=1e-11),
    "Descent": bx.Descent(optax.sgd(0.15), num_steps=1000),
    "Descent to tolerance": bx.Descent(optax.sgd(0.15), num_steps=1000, rtol=1e-11),
    "optax.lbfgs": bx.Descent(optax.lbfgs(), num_steps=60),
    "optx.BFGS": bx.Optimistix(optx.BFGS(rtol=1e-9, atol=1e-7)),
    "optx.LBFGS": bx.Optimistix(optx.LBFGS(rtol=1e-9, atol=1e-7)),
    # These stop on the length of their step, which is the gradient times 0.15.
    "optx.GradientDescent": bx.Optimistix(
        optx.GradientDescent(0.15, rtol=1e-11, atol=1e-11), rtol=1e-9
    ),
    "optx.NonlinearCG": bx.Optimistix(optx.NonlinearCG(rtol=1e-9, atol=1e-9), rtol=1e-6),
    "optx.OptaxMinimiser": bx.Optimistix(
        optx.OptaxMinimiser(optax.sgd(0.15), rtol=1e-11, atol=1e-11), rtol=1e-9
    ),
    "optx.BestSoFar": optx.BestSoFarMinimiser(optx.BFGS(rtol=1e-9, atol=1e-7)),
    "optx.Newton": optx.Newton(rtol=1e-10, atol=1e-10),
    "optx.Chord": optx.Chord(rtol=1e-10, atol=1e-10),
    "optx.LevenbergMarquardt": optx.LevenbergMarquardt(rtol=1e-9, atol=1e-9),
    "optx.GaussNewton": optx.GaussNewton(rtol=1e-9, atol=1e-9),
    "optx.Dogleg": optx.Dogleg(rtol=1e-9, atol=1e-9),
}


@pytest.mark.parametrize("name", INNER_SOLVERS)
def test_every_inner_solver_serves_implicit(name):
    oracle = oracles("float64")["quadratic"]
    estimate, _ = bx.hypergradient(
        oracle.problem,
        oracle.x0,
        oracle.theta,
        inner_solver=INNER_SOLVERS[name],
        rule=bx.Implicit(bx.linear.CG(rtol=1e-11)),
    )
    assert relative_error(estimate.grad, oracle.hypergradient) < 1e-6
    assert float(estimate.inner_residual) <= float(estimate.inner_tolerance)
    residual = oracle.problem.inner.residual(estimate.x, oracle.theta)
    assert float(estimate.inner_residual) == pytest.approx(
        float(jnp.linalg.norm(residual)), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        (optx.LevenbergMarquardt(1e-10, 1e-10), "least_squares"),
        (bx.LBFGS(rtol=1e-10), "least_squares"),
        (optx.LevenbergMarquardt(1e-11, 1e-11), "root"),
        (optx.BFGS(1e-11, 1e-11), "scalar_root"),
        (optx.Newton(1e-10, 1e-10), "fixed_point"),
        (optx.LevenbergMarquardt(1e-11, 1e-11), "fixed_point"),
    ],
    ids=lambda p: type(p).__name__ if not isinstance(p, str) else p,
)
def test_solvers_of_other_kinds_serve_every_condition(solver, name):
    oracle = oracles("float64")[name]
    estimate, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, throw=False
    )
    # Squaring a residual halves the digits: these may stop early, but then they are flagged.
    if estimate.result == bx.RESULTS.successful:
        assert relative_error(estimate.grad, oracle.hypergradient) < 1e-5
    else:
        assert estimate.result == bx.RESULTS.inner_not_converged
        assert float(estimate.inner_residual) > float(estimate.inner_tolerance)


LINEAR_SOLVERS = {
    "CG": bx.linear.CG(rtol=1e-11),
    "GradientDescent": bx.linear.GradientDescent(rtol=1e-11, max_steps=5_000),
    "Neumann": bx.linear.Neumann(num_terms=1_000),
    "lx.CG": lx.CG(rtol=1e-11, atol=1e-11),
    "lx.GMRES": lx.GMRES(rtol=1e-11, atol=1e-11),
    "lx.BiCGStab": lx.BiCGStab(rtol=1e-11, atol=1e-11),
    "lx.LSMR": lx.LSMR(rtol=1e-12, atol=1e-12),
    "lx.Cholesky": lx.Cholesky(),
    "lx.LU": lx.LU(),
    "lx.AutoLinearSolver": lx.AutoLinearSolver(well_posed=True),
}


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_every_linear_solver_serves_implicit(name):
    oracle = oracles("float64")["quadratic"]
    estimate, state = bx.hypergradient(
        oracle.problem,
        oracle.x0,
        oracle.theta,
        inner_solver=bx.NewtonCG(rtol=1e-11),
        rule=bx.Implicit(LINEAR_SOLVERS[name]),
    )
    assert relative_error(estimate.grad, oracle.hypergradient) < 1e-8
    assert float(estimate.adjoint_residual) < 1e-8
    if name in ("CG", "GradientDescent"):
        again, _ = bx.hypergradient(
            oracle.problem,
            oracle.x0,
            oracle.theta,
            inner_solver=bx.NewtonCG(rtol=1e-11),
            rule=bx.Implicit(LINEAR_SOLVERS[name]),
            state=state,
        )
        assert int(again.stats["num_adjoint_steps"]) == 0  # the warm start is the solution


RULES = {
    "Implicit": (bx.Implicit(bx.linear.CG(rtol=1e-12)), 1e-8),
    "Polished": (bx.Polished(bx.linear.CG(rtol=1e-12)), 1e-8),
    "Accurate": (bx.Accurate(1e-9), 1e-8),
    "Unrolled": (bx.Unrolled(), 1e-8),
    "Unrolled all": (bx.Unrolled(checkpoints="all"), 1e-8),
    "Truncated": (bx.Truncated(num_steps=200), 1e-8),
    "ForwardMode": (bx.ForwardMode(batch_size=5), 1e-8),
    "OneStep": (bx.OneStep(), 0.999),
    "KStep": (bx.KStep(num_steps=200), 1e-8),
    "JacobianFree": (bx.JacobianFree(), 0.999),
    "SAMA": (bx.SAMA(), 0.999),
}


# Every rule where the Hessian moves and where x and theta are trees. Where it does not move, and
# where theta weighs data, a rule is asked for the same products: there one of each family.
ORDERS = [(name, rule) for name in ("logistic", "nested") for rule in RULES]
ORDERS += [("quadratic", rule) for rule in ("Implicit", "Truncated", "ForwardMode", "OneStep")]
ORDERS += [("data_weights", rule) for rule in ("Accurate", "Unrolled", "KStep", "SAMA")]


@pytest.mark.parametrize(("name", "rule"), ORDERS)
def test_every_rule_reaches_its_order(name, rule):
    oracle = oracles("float64")[name]
    rule, bound = RULES[rule]
    matrix = (
        jax.jacobian(oracle.problem.inner.residual)(oracle.x_star, oracle.theta)
        if (name != "nested")
        else None
    )
    step = 0.1 if matrix is None else 1 / float(jnp.linalg.eigvalsh(matrix)[-1])
    solver = bx.Descent(optax.sgd(step), num_steps=2_000)
    estimate, state = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=rule
    )
    assert relative_error(estimate.grad, oracle.hypergradient) < bound
    again, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=rule, state=state
    )
    assert relative_error(again.grad, oracle.hypergradient) < bound


def test_one_step_error_is_the_contraction_factor():
    oracle = quadratic(condition=3.0)
    estimate, _ = bx.hypergradient(
        oracle.problem,
        oracle.x0,
        oracle.theta,
        inner_solver=bx.NewtonCG(rtol=1e-10),
        rule=bx.OneStep(),
    )
    matrix = jax.jacobian(oracle.problem.inner.residual)(oracle.x_star, oracle.theta)
    eigenvalues = jnp.linalg.eigvalsh(matrix)
    rho = 1 - float(eigenvalues[0] / eigenvalues[-1])
    error = oracle.v_star - np.asarray(estimate.v)
    assert np.linalg.norm(error) <= (rho + 0.06) * np.linalg.norm(oracle.v_star)
    assert float(estimate.adjoint_residual) <= rho + 0.06
    assert float(estimate.adjoint_residual) > 0.01  # and it says that it is not exact


def test_fixed_point_iteration_can_be_unrolled():
    oracle = oracles("float64")["fixed_point"]
    for rule in (bx.Unrolled(), bx.Unrolled(num_steps=200), bx.Truncated(num_steps=100)):
        estimate, _ = bx.hypergradient(
            oracle.problem,
            oracle.x0,
            oracle.theta,
            inner_solver=optx.FixedPointIteration(1e-13, 1e-13),
            rule=rule,
        )
        assert relative_error(estimate.grad, oracle.hypergradient) < 1e-8


# ---- transformations -----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["Implicit", "Unrolled", "Truncated", "ForwardMode", "KStep"])
def test_estimates_pass_through_jit_vmap_and_scan(rule):
    oracle = oracles("float64")["quadratic"]
    solver = bx.Descent(optax.sgd(0.1), num_steps=300)

    def grad(theta):
        estimate, _ = bx.hypergradient(
            oracle.problem, oracle.x0, theta, inner_solver=solver, rule=RULES[rule][0]
        )
        return estimate.grad

    @jax.jit  # one program
    def transformed(thetas):
        _, scanned = jax.lax.scan(lambda c, theta: (c, grad(theta)), 0, thetas)
        return grad(thetas[0]), jax.vmap(grad)(thetas), scanned

    thetas = jnp.stack([oracle.theta, oracle.theta + 0.3])
    loop = jnp.stack([grad(theta) for theta in thetas])
    jitted, batched, scanned = transformed(thetas)
    np.testing.assert_allclose(jitted, loop[0], rtol=1e-10)
    np.testing.assert_allclose(batched, loop, rtol=1e-9)
    np.testing.assert_allclose(scanned, loop, rtol=1e-9)


def test_no_second_compilation():
    oracle = oracles("float64")["logistic"]
    _, state = bx.hypergradient(oracle.problem, oracle.x0, oracle.theta)
    before = _estimate.num_compilations()
    for k in range(3):
        problem = bx.Bilevel(  # new but equal: same functions, other data
            oracle.problem.inner.fn,
            oracle.problem.outer,
            jax.tree_util.tree_map(lambda a, k=k: a * (1 + 0.01 * k), oracle.problem.inner_data),
            oracle.problem.outer_data,
        )
        _, state = bx.hypergradient(problem, oracle.x0, oracle.theta + k, state=state)
    assert _estimate.num_compilations() == before


def test_weak_types_and_python_numbers_do_not_recompile():
    problem = bx.Bilevel(lambda x, t: 0.5 * (x - t) ** 2, lambda x, t: x**2)
    _, state = bx.hypergradient(problem, jnp.asarray(1.0), jnp.asarray(1.0))
    before = _estimate.num_compilations()
    for theta in (2.0, np.float64(3.0), jnp.ones(()), jnp.asarray(1.0) * 2):
        bx.hypergradient(problem, 0.0, theta)
        _, state = bx.hypergradient(problem, 0.0, theta, state=state)
    assert _estimate.num_compilations() == before


@pytest.mark.parametrize("name", ["quadratic", "logistic", "fixed_point", "root", "nested"])
def test_argmin_jvp_is_the_transpose_of_vjp(name):
    oracle = oracles("float64")[name]
    solver, _ = tight(oracle)
    rule = bx.Implicit(bx.linear.CG(rtol=1e-12) if is_minimum(oracle) else lx.GMRES(1e-12, 1e-12))
    x_star = bx.argmin(oracle.problem.inner, solver, rule)
    arrays, static = eqx.partition(oracle.theta, eqx.is_array)

    def solution(arrays):
        x = x_star(oracle.x0, eqx.combine(arrays, static))
        return eqx.filter(x, eqx.is_array)

    tangent = jax.tree_util.tree_map(
        lambda a: jnp.cos(1.0 + jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), arrays
    )

    @jax.jit  # one program
    def both(arrays, tangent):
        x, x_dot = jax.jvp(solution, (arrays,), (tangent,))
        cotangent = jax.tree_util.tree_map(
            lambda a: jnp.sin(2.0 + jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), x
        )
        return x_dot, cotangent, jax.vjp(solution, arrays)[1](cotangent)

    x_dot, cotangent, (theta_bar,) = both(arrays, tangent)

    def dot(a, b):
        return sum(
            jnp.sum(p * q)
            for p, q in zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
        )

    assert float(dot(x_dot, cotangent)) == pytest.approx(float(dot(tangent, theta_bar)), rel=1e-9)
    if oracle.jacobian is not None:
        np.testing.assert_allclose(x_dot, oracle.jacobian @ tangent, rtol=1e-8)


FORWARD, REVERSE = jax.jacfwd, jax.jacrev
# Every mode after every mode, for a minimum and for an equation; every oracle with every mode.
MODES = {
    "quadratic": [(FORWARD, REVERSE), (REVERSE, FORWARD)],
    "quadratic_game": [(FORWARD, FORWARD), (REVERSE, REVERSE)],
    "scalar_root": [(FORWARD, REVERSE), (REVERSE, FORWARD)],
    "scalar_game": [(FORWARD, FORWARD), (REVERSE, REVERSE)],
}


@pytest.mark.parametrize("name", MODES)
def test_argmin_second_derivatives(name):
    oracle = oracles("float64")[name]
    solver, _ = tight(oracle)
    rule = bx.Implicit(bx.linear.CG(rtol=1e-12) if is_minimum(oracle) else lx.GMRES(1e-12, 1e-12))
    x_star = bx.argmin(oracle.problem.inner, solver, rule)

    def value(theta):
        return oracle.problem.outer_value(x_star(oracle.x0, theta), theta)[0]

    @jax.jit  # one program
    def derivatives(theta):
        hessians = [second(first(value))(theta) for first, second in MODES[name]]
        return jax.grad(value)(theta), hessians

    gradient, hessians = derivatives(oracle.theta)
    assert relative_error(gradient, oracle.hypergradient) < 1e-8
    for hessian in hessians:
        assert relative_error(hessian, oracle.hyper_hessian) < 1e-8


def test_argmin_sees_closed_over_tracers_and_a_bias_without_regulariser():
    features = jnp.cos(jnp.arange(12.0)).reshape(6, 2)
    targets = jnp.sin(jnp.arange(6.0))

    def x_of(theta, shift):
        def inner(x, theta):  # closes over shift, which is being differentiated
            prediction = features @ x["w"] + x["b"] + shift
            return 0.5 * jnp.sum((prediction - targets) ** 2) + jnp.exp(theta) * jnp.sum(
                x["w"] ** 2
            )

        x_star = bx.argmin(inner, bx.NewtonCG(rtol=1e-12), bx.Implicit(bx.linear.CG(rtol=1e-12)))
        x = x_star({"w": jnp.zeros(2), "b": jnp.zeros(())}, theta)
        return jnp.sum(jnp.sin(x["w"])) + x["b"] ** 2

    theta, shift = jnp.asarray(-0.3), jnp.asarray(0.2)
    grads = jax.grad(x_of, argnums=(0, 1))(theta, shift)
    value = jax.jit(x_of)
    step = 1e-5  # error 1e-10 of truncation, 1e-12 / 1e-5 of the solve
    for k, grad in enumerate(grads):
        up = [theta, shift]
        down = [theta, shift]
        up[k], down[k] = up[k] + step, down[k] - step
        difference = float((value(*up) - value(*down)) / (2 * step))
        assert float(grad) == pytest.approx(difference, rel=1e-6)
    batched = jax.vmap(jax.grad(x_of), in_axes=(0, None))(jnp.stack([theta, theta + 1]), shift)
    assert float(batched[0]) == pytest.approx(float(grads[0]), rel=1e-9)
    jitted = jax.jit(jax.grad(x_of, argnums=1))(theta, shift)
    assert float(jitted) == pytest.approx(float(grads[1]), rel=1e-9)


@pytest.mark.filterwarnings("ignore:bx.OneStep")
def test_argmin_unrolled_and_one_step_views_agree_with_their_estimates():
    oracle = oracles("float64")["quadratic"]
    solver = bx.Descent(optax.sgd(0.1), num_steps=20)
    for rule in (
        bx.Unrolled(),
        bx.Truncated(num_steps=5),
        bx.OneStep(),
        bx.OneStep(0.05),
        bx.KStep(3),
        bx.KStep(3, 0.05),
        bx.SAMA(),
        bx.ForwardMode(),
    ):
        inner_solver = solver if rule != bx.OneStep(0.05) else bx.NewtonCG(rtol=1e-10)
        x_star = bx.argmin(oracle.problem.inner, inner_solver, rule)

        @jax.jit  # one program
        def both(theta, inner_solver=inner_solver, rule=rule, x_star=x_star):
            estimate, _ = bx.hypergradient(
                oracle.problem, oracle.x0, theta, inner_solver=inner_solver, rule=rule
            )

            def value(theta):
                return oracle.problem.outer_value(x_star(oracle.x0, theta), theta)[0]

            return jax.grad(value)(theta), estimate.grad

        np.testing.assert_allclose(*both(oracle.theta), rtol=1e-9)


def test_argmin_on_a_black_box_in_a_callback():
    def solve(x0, theta):
        return 2.0 * np.asarray(theta)

    x_star = bx.argmin(lambda x, t: 0.5 * jnp.sum((x - 2.0 * t) ** 2), bx.External(solve))
    grad = jax.jit(jax.grad(lambda t: jnp.sum(x_star(jnp.zeros(3), t) ** 2)))(jnp.ones(3))
    np.testing.assert_allclose(grad, 8 * np.ones(3), rtol=1e-10)
    batched = jax.vmap(lambda t: x_star(jnp.zeros(3), t))(jnp.ones((2, 3)))
    np.testing.assert_allclose(batched, 2 * np.ones((2, 3)))


# Where x has kinks, or constraints; each away from those of theta.
COLUMNS = jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)))
SIDE = COLUMNS[:, :3].sum(axis=1) + 0.1 * jnp.sin(jnp.arange(30.0))
PIECEWISE = {
    "penalty": (
        bx.ProximalMinimum(
            lambda x, t: 0.5 * jnp.mean((COLUMNS.astype(x.dtype) @ x - SIDE.astype(x.dtype)) ** 2),
            bx.prox.ElasticNet(lambda t: jnp.exp(t[0]), lambda t: jnp.exp(t[1])),
        ),
        8,
        jnp.array([-2.0, -1.0]),
    ),
    "constraints": (
        bx.QP(
            Q=lambda t: jnp.array([[2, 0.5], [0.5, 1]], t.dtype),
            q=lambda t: -3 * t,
            A=lambda t: jnp.ones((1, 2), t.dtype) * t[0],
            b=1.0,
            G=lambda t: -jnp.eye(2, dtype=t.dtype),
            h=0.0,
        ),
        2,
        jnp.array([1.5, 1.2]),
    ),
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_kinks_and_constraints_pass_the_same_transformations(name):
    """`jit`, `vmap`, `scan`, jvp against vjp, second derivatives, float32."""
    condition, size, theta = PIECEWISE[name]
    problem = bx.Bilevel(condition, lambda x, t: jnp.sum(jnp.sin(x)) + x[0] * t[1])

    def grad(theta):
        x0 = jnp.zeros(size, theta.dtype)
        estimate, _ = bx.hypergradient(problem, x0, theta, throw=False)
        return estimate.grad, estimate.result.index

    x_star = bx.argmin(condition)

    def value(theta):
        return problem.outer(x_star(jnp.zeros(size, theta.dtype), theta), theta)

    @jax.jit  # one program
    def transformed(thetas):
        _, scanned = jax.lax.scan(lambda c, theta: (c, grad(theta)), 0, thetas)
        forward, reverse = jax.jacfwd(value)(thetas[0]), jax.grad(value)(thetas[0])
        hessian = jax.jacfwd(jax.grad(value))(thetas[0])
        return grad(thetas[0]), jax.vmap(grad)(thetas), scanned, forward, reverse, hessian

    step = 1e-5
    thetas = theta[None] + step * jnp.array([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    (jitted, result), (batched, _), (scanned, _), *derivatives = transformed(thetas)
    assert bx.RESULTS.names()[int(result)] == "successful"
    np.testing.assert_allclose(batched[0], jitted, rtol=1e-9)
    np.testing.assert_allclose(scanned, batched, rtol=1e-9)
    forward, reverse, hessian = derivatives
    np.testing.assert_allclose(forward, jitted, rtol=1e-8)
    np.testing.assert_allclose(reverse, jitted, rtol=1e-8)
    differences = jnp.stack([batched[1] - batched[2], batched[3] - batched[4]]) / (2 * step)
    np.testing.assert_allclose(hessian, differences, rtol=1e-6, atol=1e-6)
    single, result = jax.jit(grad)(theta.astype(jnp.float32))
    assert bx.RESULTS.names()[int(result)] == "successful" and single.dtype == jnp.float32
    np.testing.assert_allclose(single, jitted, rtol=1e-3, atol=1e-4)


# ---- the explicit Jacobian ------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in REGULAR if oracles("float64")[n].jacobian is not None])
def test_jacobian_is_the_oracles(name):
    oracle = oracles("float64")[name]
    x = jax.tree_util.tree_map(jnp.asarray, oracle.x_star)
    rule = (
        bx.Implicit(bx.linear.CG(rtol=1e-11))
        if is_minimum(oracle)
        else bx.Implicit(lx.GMRES(1e-11, 1e-11))
    )
    out = bx.jacobian(oracle.problem, x, oracle.theta, rule=rule)
    assert relative_error(out.value, oracle.jacobian) < 1e-8
    assert float(out.adjoint_residual) < 1e-8


def test_jacobian_forward_and_reverse_agree_on_pytrees():
    def inner(x, theta):
        return 0.5 * jnp.sum((x["a"] - theta["p"] ** 2) ** 2) + 0.5 * (
            x["b"] - jnp.sum(theta["q"])
        ) ** 2 * (1 + theta["p"][0] ** 2)

    problem = bx.Bilevel(inner, lambda x, t: x["b"])
    for num_q in (1, 7):  # one entry of q: forward; seven: reverse
        theta = {"p": jnp.array([1.0, 2.0]), "q": jnp.ones(num_q)}
        x = {"a": theta["p"] ** 2, "b": jnp.sum(theta["q"])}
        value = bx.jacobian(problem, x, theta).value
        np.testing.assert_allclose(value["a"]["p"], jnp.diag(2 * theta["p"]), atol=1e-10)
        np.testing.assert_allclose(value["a"]["q"], jnp.zeros((2, num_q)), atol=1e-10)
        np.testing.assert_allclose(value["b"]["q"], jnp.ones(num_q), rtol=1e-10)
        np.testing.assert_allclose(value["b"]["p"], jnp.zeros(2), atol=1e-10)


def test_jacobian_refuses_an_x_that_is_no_solution():
    game = quadratic_game()
    with pytest.raises(bx.SolveError, match="not a solution") as error:
        bx.jacobian(game.problem, game.x0 + 1.0, game.theta)
    assert error.value.result == bx.RESULTS.inner_not_converged


def test_memory_of_implicit_does_not_grow_with_inner_steps():
    oracle = oracles("float64")["logistic"]  # not quadratic: the way back needs every x_k

    def temp_bytes(rule, num_steps):
        solver = bx.Descent(optax.sgd(0.1), num_steps=num_steps)

        def grad(theta):
            estimate, _ = bx.hypergradient(
                oracle.problem, oracle.x0, theta, inner_solver=solver, rule=rule, throw=False
            )
            return estimate.grad

        compiled = jax.jit(grad).lower(oracle.theta).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(bx.Implicit(), 10_000) <= temp_bytes(bx.Implicit(), 10) + 64
    # and the measure can tell: unrolling with every carry kept does grow
    assert temp_bytes(bx.Unrolled(checkpoints="all"), 10_000) > 100_000
