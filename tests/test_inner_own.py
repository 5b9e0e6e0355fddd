"""NewtonCG and LBFGS: closed forms and SciPy as oracle, and every way to fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import bilevax as bx
from bilevax._inner._base import residual_and_scale
from bilevax._tree import tree_norm

KINDS = {
    "cg": functools.partial(bx.NewtonCG, dense=False),
    "dense": functools.partial(bx.NewtonCG, dense=True),
    "lbfgs": bx.LBFGS,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def compiled(fn, kind, is_default):
    def run(y0, args, rtol, atol, max_steps):
        solver = KINDS[kind]() if is_default else KINDS[kind](rtol=rtol, atol=atol)
        return optx.minimise(fn, solver, y0, args, max_steps=max_steps, throw=False)

    return jax.jit(run, static_argnums=4)


def minimise(fn, kind, y0, args=None, rtol=None, atol=0.0, max_steps=500):
    """One compilation for all tolerances of a function: the tests are fast enough so."""
    default = rtol is None
    return compiled(fn, kind, default)(y0, args, 0.0 if default else rtol, atol, max_steps)


def succeeded(solution):
    assert solution.result == optx.RESULTS.successful, optx.RESULTS[solution.result]
    assert solution.stats["residual"] <= solution.stats["tolerance"]
    return solution


def squares(y, weight):
    return jnp.sum(weight * y**2)


def quadratic(y, args):
    matrix, c = args
    return 0.5 * jnp.dot(y, matrix @ y) - jnp.dot(c, y)


def make_quadratic(size=50, condition=100.0, seed=0):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (basis * np.geomspace(1, condition, size)) @ basis.T
    return jnp.asarray((matrix + matrix.T) / 2), jnp.asarray(rng.normal(size=size))


def logistic(w, args):
    features, labels, strength = args
    losses = jax.nn.softplus(-labels * (features @ w["w"] + w["b"]))
    return jnp.mean(losses) + 0.5 * strength * jnp.sum(w["w"] ** 2)


def make_logistic(dtype=jnp.float64, num=200, size=12):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(num, size)) * np.geomspace(1, 0.05, size)
    labels = np.sign(features @ rng.normal(size=size) + 0.5 + rng.normal(size=num))
    args = tuple(jnp.asarray(a, dtype) for a in (features, labels, 1e-3))
    return {"w": jnp.zeros(size, dtype), "b": jnp.zeros((), dtype)}, args


def rosenbrock(y, scale):
    return scale * (100 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2)


@every_kind
@pytest.mark.parametrize("rtol", [1e-2, 1e-10])
def test_quadratic_has_its_closed_form(kind, rtol):
    matrix, c = make_quadratic()
    solution = succeeded(minimise(quadratic, kind, jnp.zeros(50), (matrix, c), rtol))
    error = jnp.linalg.norm(matrix @ solution.value - c)
    np.testing.assert_allclose(solution.stats["residual"], error, rtol=1e-2, atol=1e-12)
    # the scale is ||A y||, which is ||c|| at the solution
    np.testing.assert_allclose(solution.stats["tolerance"], rtol * jnp.linalg.norm(c), rtol=rtol)
    if kind == "dense":  # each of 50 variables to the accuracy asked for
        np.testing.assert_allclose(solution.value, jnp.linalg.solve(matrix, c), rtol=50 * rtol)
    assert error <= rtol * jnp.linalg.norm(c) * (1 + rtol)


@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
def test_newton_cg_costs_little_more_than_cg_on_a_quadratic(rtol):
    matrix, c = make_quadratic()
    solution = succeeded(minimise(quadratic, "cg", jnp.zeros(50), (matrix, c), rtol))
    plain = bx.linear.CG(rtol=rtol).solve(lambda v: matrix @ v, c)
    assert solution.stats["num_gradients"] <= 3
    assert int(solution.stats["num_hessian_products"]) <= 1.2 * int(plain.num_products) + 5


@every_kind
def test_logistic_agrees_with_scipy(kind):
    w0, args = make_logistic()
    flat, unravel = jax.flatten_util.ravel_pytree(w0)
    fun = jax.jit(jax.value_and_grad(lambda w: logistic(unravel(w), args)))
    oracle = scipy.optimize.minimize(
        lambda w: [np.asarray(a) for a in fun(w)], flat, jac=True, method="BFGS", tol=1e-9
    )
    solution = succeeded(minimise(logistic, kind, w0, args, 0.0, 1e-8))
    found, _ = jax.flatten_util.ravel_pytree(solution.value)
    assert jnp.linalg.norm(fun(found)[1]) <= 1e-8
    np.testing.assert_allclose(found, oracle.x, atol=1e-5)


@every_kind
def test_the_reported_sides_are_those_of_the_law(kind):
    w0, args = make_logistic()
    w0 = jax.tree_util.tree_map(lambda x: x + 0.3, w0)
    rtol = 1e-5
    solution = succeeded(minimise(logistic, kind, w0, args, rtol))
    residual, scale = residual_and_scale(bx.Minimum(logistic), solution.value, w0, args)
    np.testing.assert_allclose(solution.stats["residual"], residual, rtol=1e-6)
    assert scale <= solution.stats["tolerance"] / rtol * (1 + 1e-6)
    _, product = jax.jvp(
        jax.grad(lambda w: logistic(w, args)), (solution.value,), (solution.value,)
    )
    np.testing.assert_allclose(solution.stats["tolerance"], rtol * tree_norm(product), rtol=1e-6)


@every_kind
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rosenbrock_whatever_its_scale(kind, scale):
    y0 = jnp.array([-1.2, 1.0])
    solution = succeeded(minimise(rosenbrock, kind, y0, jnp.asarray(scale), 1e-8))
    np.testing.assert_allclose(solution.value, [1.0, 1.0], atol=1e-5)
    assert solution.stats["num_steps"] < 100


@every_kind
def test_iterates_do_not_depend_on_the_scale_of_the_objective(kind):
    y0 = jnp.array([-1.2, 1.0])
    one, two = (
        minimise(rosenbrock, kind, y0, jnp.asarray(scale), 0.0, max_steps=10).value
        for scale in (1.0, 2.0**40)
    )
    np.testing.assert_array_equal(one, two)
    assert not jnp.array_equal(one, y0)


@every_kind
def test_far_quartic_is_not_stopped_early(kind):
    y0 = jnp.array(100.0)
    solution = succeeded(minimise(lambda y, _: y**4 / 4 - y, kind, y0, rtol=1e-6))
    # the error is the residual over the curvature H, and the scale is |H y0|
    assert abs(solution.value - 1) <= 1.01 * 1e-6 * y0


@every_kind
def test_start_and_solution_at_zero(kind):
    at_zero = succeeded(minimise(squares, kind, jnp.zeros(3), 1.0))
    assert at_zero.stats["num_gradients"] == 1
    to_zero = succeeded(minimise(squares, kind, jnp.ones(3), 1.0))
    np.testing.assert_allclose(to_zero.value, 0, atol=2e-6)


@every_kind
def test_a_start_that_is_the_solution_costs_one_gradient(kind):
    matrix, c = make_quadratic()
    y0 = jnp.linalg.solve(matrix, c)
    solution = succeeded(minimise(quadratic, kind, y0, (matrix, c), 1e-6))
    assert solution.stats["num_gradients"] == 1
    # that of the stopping rule and, to know x, the columns of the Hessian
    assert solution.stats["num_hessian_products"] <= 2 + (50 if kind == "dense" else 0)
    np.testing.assert_array_equal(solution.value, y0)


@every_kind
@pytest.mark.parametrize("relative", [5e-8, 5e-10])
def test_warm_start_near_the_optimum_does_not_stall(kind, relative):
    # Optimistix' LBFGS takes hundreds of steps here and does not arrive.
    w0, args = make_logistic()
    exact = minimise(logistic, "dense", w0, args, 1e-13).value
    near = {"w": exact["w"].at[0].add(relative), "b": exact["b"]}
    solution = succeeded(minimise(logistic, kind, near, args, 1e-2 * relative))
    assert 2 <= solution.stats["num_gradients"] <= 25


@every_kind
def test_float32_reaches_the_default_tolerance_and_names_its_floor(kind):
    w0, args = make_logistic(jnp.float32)
    solution = succeeded(minimise(logistic, kind, w0, args))
    assert solution.value["w"].dtype == solution.stats["residual"].dtype == jnp.float32
    stalled = minimise(logistic, kind, w0, args, np.float32(1e-12), np.float32(0))
    assert stalled.result == optx.RESULTS.stagnation
    assert stalled.stats["tolerance"] < stalled.stats["residual"] < 1e-5
    assert stalled.stats["num_gradients"] < 150


@every_kind
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nonfinite_objective_is_named(kind, bad):
    solution = minimise(squares, kind, jnp.ones(3), bad)
    assert solution.result == optx.RESULTS.nonfinite
    assert not jnp.isfinite(solution.stats["residual"])


@every_kind
def test_unbounded_objective_is_no_success(kind):
    for fn in (lambda y, _: -jnp.sum(y), lambda y, _: -jnp.sum(y**2)):
        solution = minimise(fn, kind, jnp.ones(3), rtol=1e-6, max_steps=100)
        assert solution.result != optx.RESULTS.successful
        assert not solution.stats["residual"] <= solution.stats["tolerance"]


@every_kind
def test_candidates_outside_the_domain_are_rejected(kind):
    # a Newton step from 3 leads to -3, where the logarithm is not a number
    solution = minimise(lambda y, _: y - jnp.log(y), kind, jnp.array(3.0), rtol=1e-8)
    np.testing.assert_allclose(succeeded(solution).value, 1.0, atol=1e-6)


@every_kind
def test_descends_from_negative_curvature_to_a_minimum(kind):
    def fn(y, _):
        return (y[0] ** 2 - 1) ** 2 + y[1] ** 2

    solution = succeeded(minimise(fn, kind, jnp.array([0.1, 1.0])))
    np.testing.assert_allclose(solution.value, [1.0, 0.0], atol=1e-5)


@every_kind
def test_singular_hessian_converges_and_leaves_the_null_space_alone(kind):
    rng = np.random.default_rng(2)
    features, targets = jnp.asarray(rng.normal(size=(4, 9))), jnp.asarray(rng.normal(size=4))

    def fn(y, _):
        return jnp.sum((features @ y - targets) ** 2)

    solution = succeeded(minimise(fn, kind, jnp.zeros(9), rtol=1e-9))
    minimum_norm = jnp.linalg.pinv(features) @ targets
    np.testing.assert_allclose(solution.value, minimum_norm, atol=1e-7)


@every_kind
def test_vmap_equals_a_loop(kind):
    weights = jnp.array([1.0, 3.0, 20.0])
    cs = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1e3, 0.0, -1.0]])

    def solve(c):
        solution = minimise(quadratic, kind, jnp.zeros(3), (jnp.diag(weights), c), 1e-9)
        return solution.value, solution.stats["num_gradients"]

    batched, counts = jax.vmap(solve)(cs)
    for value, count, c in zip(batched, counts, cs, strict=True):
        alone, num_alone = solve(c)
        np.testing.assert_allclose(value, alone, rtol=1e-9)
        assert count == num_alone


@every_kind
def test_counts_are_those_of_an_oracle(kind):
    calls = []

    def fn(y, _):
        calls.append(None)
        return 0.5 * jnp.sum(jnp.array([1.0, 1.0, 4.0]) * y**2) - jnp.sum(y), None

    solver, y, num_steps = KINDS[kind](rtol=1e-3), jnp.zeros(3), 0
    state = solver.init(fn, y, None, {}, None, None, frozenset())
    with jax.disable_jit():
        while not state.is_done:
            y, state, _ = solver.step(fn, y, None, {}, state, frozenset())
            num_steps += 1
    stats = solver.postprocess(fn, y, None, None, {}, state, frozenset(), state.result)[2]
    assert stats["num_gradients"] == num_steps
    if kind == "lbfgs":
        # its Hessian products, and nothing else, evaluate the function once more
        assert len(calls) == num_steps + stats["num_hessian_products"]
        assert stats["num_hessian_products"] < num_steps
    else:
        # one a step for the stopping rule, and two steps of conjugate gradients for two
        # distinct eigenvalues; or three columns, twice, as the one step was long
        assert len(calls) == num_steps == 2
        assert stats["num_hessian_products"] == 2 + (2 * 3 if kind == "dense" else 2)


@every_kind
def test_steps_after_convergence_change_nothing_and_differentiate(kind):
    # Unrolled differentiation goes on stepping after the solution is reached.
    solver = KINDS[kind](rtol=1e-6)

    def fn(y, theta):
        return 0.5 * jnp.sum((y - theta) ** 2), None

    def unrolled(theta):
        y = jnp.zeros(2)
        state = solver.init(fn, y, theta, {}, None, None, frozenset())

        def body(carry, _):
            y, state, _ = solver.step(fn, *carry[:1], theta, {}, carry[1], frozenset())
            return (y, state), None

        (y, state), _ = jax.lax.scan(body, (y, state), length=8)
        return y

    theta = jnp.array([2.0, -1.0])
    value, tangent = jax.jit(lambda t: jax.jvp(unrolled, (t,), (jnp.ones(2),)))(theta)
    np.testing.assert_allclose(value, theta, atol=1e-6)
    np.testing.assert_allclose(tangent, 1.0, atol=1e-6)


def test_auxiliary_output_is_that_of_the_solution():
    for solver in (bx.NewtonCG(), bx.LBFGS()):
        solution = optx.minimise(
            lambda y, _: ((y - 2) ** 4 + y**2, {"y": y}), solver, jnp.array(9.0), has_aux=True
        )
        np.testing.assert_array_equal(solution.aux["y"], solution.value)


def test_bad_arguments_are_refused():
    for solver in (bx.NewtonCG, bx.LBFGS):
        with pytest.raises(ValueError, match=f"{solver.__name__}.rtol=...."):
            solver(rtol=-1.0)
    with pytest.raises(ValueError, match="history_length"):
        bx.LBFGS(history_length=0)
    with pytest.raises(ValueError, match="max_cg_steps"):
        bx.NewtonCG(max_cg_steps=0)
