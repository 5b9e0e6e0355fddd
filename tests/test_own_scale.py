"""The accuracy asked for in every variable's own scale, whatever the start; kinks; no minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import bilevax as bx
from bilevax._inner._kinks import may_have_kinks
from bilevax._inner._own_scale import compare
from bilevax._linear._in_turn import factorise

SOLVERS = {
    "default": None,
    "cg": bx.NewtonCG(dense=False),
    "LBFGS": bx.LBFGS(),
    "BFGS": optx.BFGS(1e-6, 1e-6),
}


def hypergradient(inner, outer, x0, theta, data=None, **choices):
    problem = bx.Bilevel(inner, outer, inner_data=data, outer_data=data)
    return bx.hypergradient(problem, x0, theta, throw=False, **choices)[0]


def is_right_or_flagged(estimate, exact, rtol=1e-2):
    if estimate.result == bx.RESULTS.successful:
        np.testing.assert_allclose(estimate.grad, exact, rtol=rtol, atol=0)
        return True
    return False


def barrier(x, theta, weight):  # x* = weight / theta
    return jnp.sum(theta * x - weight * jnp.log(x))


def log_of_it(x, theta, weight):
    return jnp.sum(jnp.log(x))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(jnp.float64, [1e-2, 1e-4, 1e-6, 1e-8, 1e-10]), (jnp.float32, [1e-2, 1e-3, 1e-4, 1e-6])],
)
def test_a_solution_far_smaller_than_the_start(solver, dtype, weights):
    inner_solver = SOLVERS[solver]
    if solver == "BFGS" and dtype == jnp.float32:
        inner_solver = optx.BFGS(1e-4, 1e-4)
    num_right = 0
    for number in weights:
        one, two, weight = (jnp.asarray(a, dtype) for a in (1.0, 2.0, number))
        estimate = hypergradient(barrier, log_of_it, one, two, weight, inner_solver=inner_solver)
        num_right += is_right_or_flagged(estimate, -0.5)
    assert num_right >= (0 if solver == "BFGS" else len(weights) - 1)


def test_one_stiff_variable_does_not_set_the_scale_of_all():
    """`x_i* = weight_i / theta` from 1 down to 1e-8, all from the same start."""
    weights = jnp.logspace(0, -8, 9)
    exact = -9 / 2.0
    for solver in ("default", "cg", "LBFGS"):
        x0, theta = jnp.ones(9), jnp.asarray(2.0)
        estimate = hypergradient(
            barrier, log_of_it, x0, theta, weights, inner_solver=SOLVERS[solver]
        )
        assert is_right_or_flagged(estimate, exact) or solver != "default"


def test_an_adjoint_system_in_which_small_variables_hide():
    """Beyond the size of a factorisation the residual is one norm: flagged, with a remedy."""
    rng = np.random.default_rng(0)
    weights, target = jnp.asarray(10.0 ** rng.uniform(-8, 1, 40)), jnp.asarray(rng.normal(size=40))
    x0, theta = jnp.ones(40), jnp.asarray(2.0)

    def outer(x, theta, weight):
        return target @ jnp.log(x)

    estimate = hypergradient(barrier, outer, x0, theta, weights)
    assert estimate.result == bx.RESULTS.adjoint_not_converged
    rule = bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.Jacobi())
    remedied = hypergradient(barrier, outer, x0, theta, weights, rule=rule)
    assert remedied.result == bx.RESULTS.successful
    np.testing.assert_allclose(remedied.grad, -jnp.sum(target) / 2, rtol=1e-6)
    x_star = bx.argmin(bx.Minimum(barrier, weights), throw=False)
    assert jnp.isnan(jax.grad(lambda theta: outer(x_star(x0, theta), theta, None))(theta))


def scaled_inner(x, theta, data):
    y = data["unit"] * x
    loss = jnp.sum(jnp.log(jnp.cosh(data["c"] @ y - theta)))
    return 0.5 * y @ (data["A"] @ y) + loss


def scaled_outer(x, theta, data):
    return jnp.sum(jnp.cos(data["unit"] * x - 0.3))


def test_units_of_the_variables_change_nothing():
    """Each variable in a unit of its own, 1e-8 to 1e8: the same answer, in as many steps."""
    rng = np.random.default_rng(0)
    for size in (3, 12):
        root = rng.normal(size=(size, size))
        data = {
            "A": jnp.asarray(root @ root.T / size + 0.1 * np.eye(size)),
            "c": jnp.asarray(rng.normal(size=(4, size))),
            "unit": jnp.ones(size),
        }
        theta, y0 = jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=size))
        plain = hypergradient(scaled_inner, scaled_outer, y0, theta, data)
        assert plain.result == bx.RESULTS.successful
        for _ in range(5):
            unit = jnp.asarray(10.0 ** rng.uniform(-8, 8, size))
            given = data | {"unit": unit}
            estimate = hypergradient(scaled_inner, scaled_outer, y0 / unit, theta, given)
            assert estimate.result == bx.RESULTS.successful
            np.testing.assert_allclose(estimate.grad, plain.grad, rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(
                estimate.stats["num_inner_steps"], plain.stats["num_inner_steps"]
            )


def flat_valley(x, theta, data):
    return 0.5 * jnp.sum((data["R"] @ x - data["S"] @ theta - data["b"]) ** 2)


def test_the_solution_nearest_to_the_start():
    """Rank-deficient least squares in few variables: no drift along the null space."""
    rng = np.random.default_rng(3)
    for size in (3, 12):
        for _ in range(30):
            rank = int(rng.integers(1, size))
            R = rng.normal(size=(rank, size)) * 10.0 ** rng.uniform(-1, 1, (rank, 1))
            # as many rows as variables, so that the program is one for every rank
            R = np.concatenate([R, np.zeros((size - rank, size))])
            mix, _ = np.linalg.qr(rng.normal(size=(size, size)))
            data = {
                "R": jnp.asarray(mix @ R),
                "S": jnp.asarray(mix @ R @ rng.normal(size=(size, 2))),
                "b": jnp.asarray(mix @ R @ rng.normal(size=size)),
            }
            x0, theta = jnp.asarray(rng.normal(size=size)), jnp.asarray(rng.normal(size=2))
            inverse = np.linalg.pinv(np.asarray(data["R"]), rcond=1e-10)
            nearest = x0 + inverse @ (data["S"] @ theta + data["b"] - data["R"] @ x0)
            exact = (inverse @ np.asarray(data["S"])).T @ np.sign(nearest)
            estimate = hypergradient(
                flat_valley, lambda x, theta, data: jnp.sum(jnp.abs(x)), x0, theta, data
            )
            assert estimate.result == bx.RESULTS.successful
            np.testing.assert_allclose(estimate.x, nearest, atol=1e-6)
            np.testing.assert_allclose(estimate.grad, exact, rtol=1e-6, atol=1e-6)


def relu_inner(x, theta, weight):
    return 0.5 * jnp.sum((x - theta) ** 2) + weight * jnp.sum(jnp.maximum(0, x))


def lasso(x, theta, weight):
    return 0.5 * jnp.sum((x - theta) ** 2) + weight * jnp.sum(jnp.abs(x))


@pytest.mark.parametrize("solver", ["default", "LBFGS"])
@pytest.mark.parametrize("inner", [relu_inner, lasso])
def test_kinks_are_named(inner, solver):
    """At a kink the solution stays while theta moves; away from it all is well."""

    def outer(x, theta, weight):
        return jnp.sum((x + 1.0) ** 2)

    for theta in (0.5, 0.3, 0.9, -2.0, 2.0, 3.0):
        for x0 in (1.0, 0.0, -3.0):
            estimate = hypergradient(
                inner,
                outer,
                jnp.asarray(x0),
                jnp.asarray(theta),
                jnp.asarray(1.0),
                inner_solver=SOLVERS[solver],
            )
            low, high = (0.0, 1.0) if inner is relu_inner else (-1.0, 1.0)
            if low <= theta <= high:
                assert estimate.result == bx.RESULTS.not_smooth
            else:
                assert estimate.result == bx.RESULTS.successful
                slope = 2 * (float(theta) - (1.0 if theta > high else low) + 1)
                np.testing.assert_allclose(estimate.grad, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["default", "LBFGS"])
def test_no_minimum_is_named(solver):
    for inner in (
        lambda x, theta: -theta * jnp.sum(x),
        lambda x, theta: theta * jnp.sum(0.5 * jnp.sin(x) - x),
    ):
        estimate = hypergradient(
            inner,
            lambda x, theta: jnp.sum(x**2),
            jnp.ones(3),
            jnp.asarray(1.0),
            inner_solver=SOLVERS[solver],
        )
        assert estimate.result == bx.RESULTS.unbounded


def test_which_functions_have_kinks():
    x, mask = jnp.ones(3), jnp.array([True, False, True])
    smooth = [
        lambda x: jnp.sum(jax.nn.softplus(x)),
        lambda x: jnp.mean(jnp.logaddexp(0.0, -2 * x)),
        lambda x: jnp.sum(jax.nn.log_softmax(x)),
        lambda x: jnp.sum(jax.nn.log_sigmoid(x)),
        lambda x: jnp.sum(jnp.where(mask, x, 0.0)),
        lambda x: jnp.max(jnp.arange(3.0)) * jnp.sum(x**2),
        lambda x: x[jnp.array([0, 1])].sum() + jnp.var(x),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c), x),
        lambda x: jnp.max(jax.lax.stop_gradient(x)) * jnp.sum(x),
    ]
    kinked = [
        lambda x: jnp.sum(jnp.abs(x)),
        lambda x: jnp.sum(jax.nn.relu(x)),
        lambda x: jnp.max(x),
        lambda x: jnp.sum(jnp.where(x > 0, x, 0.0)),
        lambda x: jax.lax.scan(lambda c, _: (jax.nn.relu(c), None), x, length=2)[0],
        lambda x: jax.checkpoint(lambda x: jnp.sum(jnp.clip(x, 0, 1)))(x),
        lambda x: jax.lax.cond(x[0] > 0, jnp.sum, lambda x: 2 * jnp.sum(x), x),
    ]
    assert not any(may_have_kinks(fn, x) for fn in smooth)
    assert all(may_have_kinks(fn, x) for fn in kinked)


@jax.jit
def _scale_of_one_row(row, i, z):
    def product(v):
        flat = jnp.concatenate([jnp.atleast_1d(a) for a in v])
        return flat.at[i].set(row @ flat)

    return compare(jnp.zeros(row.size).at[i].set(1e-6), product, z).scale


def test_terms_that_cancel_do_not_make_a_row_small():
    """A chain in which the terms of one row cancel exactly, that row wherever it may be."""
    size = 64
    z = np.random.default_rng(0).uniform(0.5, 1.5, size)
    scales = []
    for leaves in (1, 64):  # one array; scalars
        parts = [jnp.asarray(a) for a in np.split(z, leaves)]
        parts = [a[0] for a in parts] if leaves == size else parts
        for i in range(1, size - 1, 2):
            row = np.zeros(size)
            row[i - 1 : i + 2] = z[i] / z[i - 1], -2.0, z[i] / z[i + 1]

            # over the root of the number of rows: of the terms of this row
            scales.append(float(_scale_of_one_row(row, i, parts)) / (8 * z[i]))
    assert np.min(scales) > 1e-3
    assert np.median(scales) > 0.5


IN_TURN = {
    "dense": (bx.NewtonCG(dense=True), bx.Implicit(bx.linear.Direct(), error_estimate=True), 1e-10),
    # conjugate gradients stop at 1e-6
    "sketched": (
        bx.NewtonCG(),
        bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.Nystrom(rank=60)),
        1e-5,
    ),
}


@pytest.mark.parametrize("name", IN_TURN)
def test_a_batch_of_factorisations_does_not_wait_for_itself(name):
    """Two batched factorisations side by side stop XLA's threads for ever on two cores."""
    num, size = 3, 100
    root = jax.random.normal(jax.random.key(0), (num, size, 2 * size))
    A, b = root @ root.mT / size, jax.random.normal(jax.random.key(1), (num, size))
    solver, rule, rtol = IN_TURN[name]

    def inner(x, theta, data):
        A, b = data
        curved = 0.1 * jnp.sum(jnp.logaddexp(x, -x))
        return 0.5 * x @ A @ x - b @ x + 0.5 * jnp.exp(theta) * jnp.sum(x**2) + curved

    def estimate(A, b):
        problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 1.0) ** 2), (A, b))
        at = jnp.zeros(size), jnp.asarray(0.3)
        return bx.hypergradient(problem, *at, inner_solver=solver, rule=rule, throw=False)[0]

    batch = jax.jit(jax.vmap(estimate))(A, b)
    alone = [jax.jit(estimate)(*row) for row in zip(A, b, strict=True)]
    assert jnp.all(batch.result == bx.RESULTS.successful)
    assert jnp.allclose(batch.grad, jnp.stack([a.grad for a in alone]), rtol=rtol)


def test_factorisations_take_turns_in_a_batch():
    matrices = jnp.stack([jnp.eye(100)] * 3)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda a: factorise(jnp.linalg.cholesky, a)))(matrices)
    assert "platform_index" in str(jaxpr)  # on a CPU by a loop, elsewhere at once
    found = jax.jit(jax.vmap(lambda a: factorise(jnp.linalg.cholesky, a)))(4 * matrices)
    np.testing.assert_allclose(found, 2 * matrices)
