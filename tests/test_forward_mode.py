"""Forward mode: the derivative of the steps in the digits of reverse mode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx
from bilevax.testing import learned_step_size, logistic, quadratic, relative_error

ORACLE = logistic()


def start(theta):
    return ORACLE.x0 + 0.1 * jnp.sum(theta)


# Some with all columns at once, some in batches: of a fixed number of steps and of another.
# All columns to a tolerance are below.
SOLVERS = {
    "sgd": (bx.Descent(optax.sgd(0.3), 7), bx.ForwardMode()),
    "adam": (bx.Descent(optax.adam(0.05, eps_root=1e-12), 23), bx.ForwardMode(batch_size=4)),
    "learned": (bx.Descent(lambda theta: optax.sgd(0.3 + 0.01 * theta[0]), 7), bx.ForwardMode()),
    "to a tolerance": (bx.Descent(optax.sgd(0.7), 500, rtol=1e-6), bx.ForwardMode(batch_size=4)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_forward_mode_equals_reverse_mode(name):
    solver, rule = SOLVERS[name]
    unrolled, _ = bx.hypergradient(
        ORACLE.problem, start, ORACLE.theta, inner_solver=solver, rule=bx.Unrolled()
    )
    estimate, state = bx.hypergradient(
        ORACLE.problem, start, ORACLE.theta, inner_solver=solver, rule=rule
    )
    assert relative_error(estimate.grad, unrolled.grad) < 1e-12
    np.testing.assert_allclose(estimate.value, unrolled.value, rtol=1e-14)
    assert estimate.stats["num_inner_steps"] == unrolled.stats["num_inner_steps"]
    after, _ = bx.hypergradient(  # and on from there
        ORACLE.problem,
        start,
        ORACLE.theta,
        inner_solver=solver,
        rule=rule,
        state=state,
        throw=name != "to a tolerance",
    )
    if name == "to a tolerance":  # nothing is left to do, and no step to differentiate
        assert bool(after.result == bx.RESULTS.path_dependent)


def test_num_steps_and_a_learned_step_size():
    oracle = learned_step_size()
    solver = bx.Descent(optax.sgd(1.0), num_steps=50)
    estimate, _ = bx.hypergradient(
        oracle.problem, oracle.x0, oracle.theta, inner_solver=solver, rule=bx.ForwardMode(10)
    )
    assert relative_error(estimate.grad, oracle.hypergradient) < 1e-12


@pytest.mark.parametrize(
    "solver",
    [
        bx.Descent(optax.lbfgs(), 40),  # after convergence, and with a line search
        optx.BFGS(1e-10, 1e-10),
        bx.LBFGS(rtol=1e-9),
        bx.NewtonCG(rtol=1e-10, dense=False),
    ],
    ids=["optax.lbfgs", "optx.BFGS", "LBFGS", "NewtonCG"],
)
def test_loops_of_unknown_length_are_differentiated(solver):
    estimate, _ = bx.hypergradient(
        ORACLE.problem, ORACLE.x0, ORACLE.theta, inner_solver=solver, rule=bx.ForwardMode()
    )
    assert relative_error(estimate.grad, ORACLE.hypergradient) < 1e-5


def test_jvp_vjp_and_nested_jvps_of_the_solution():
    oracle = quadratic(condition=3.0)
    x_star = bx.argmin(oracle.problem.inner, bx.Descent(optax.sgd(0.2), 150), bx.ForwardMode())

    def value(theta):
        return oracle.problem.outer_value(x_star(oracle.x0, theta), theta)[0]

    grad = jax.grad(value)(oracle.theta)
    assert relative_error(grad, oracle.hypergradient) < 1e-8
    tangent = jnp.cos(jnp.arange(1.0 * oracle.theta.size))
    _, slope = jax.jvp(value, (oracle.theta,), (tangent,))
    assert float(slope) == pytest.approx(float(jnp.vdot(grad, tangent)), rel=1e-10)
    assert relative_error(jax.jit(jax.hessian(value))(oracle.theta), oracle.hyper_hessian) < 1e-6
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(lambda t: jnp.sum(jax.grad(value)(t)))(oracle.theta)


def test_what_inner_closes_over_is_differentiated_and_nothing_else():
    calls = []

    def x_of(theta, shift):
        def inner(x, theta):
            calls.append(x)
            return 0.5 * jnp.sum((x - theta * shift) ** 2)

        x_star = bx.argmin(inner, bx.Descent(optax.sgd(0.5), 3), bx.ForwardMode())
        return jnp.sum(x_star(jnp.zeros(2), theta))

    theta, shift = jnp.array([1.0, 2.0]), jnp.asarray(3.0)
    # x_3 = (1 - 1/8) theta shift
    by_theta, by_shift = jax.grad(x_of, argnums=(0, 1))(theta, shift)
    np.testing.assert_allclose(by_theta, 0.875 * 3 * np.ones(2), rtol=1e-14)
    np.testing.assert_allclose(by_shift, 0.875 * 3, rtol=1e-14)


def test_the_steps_are_taken_once_for_all_columns():
    size, columns = 300, 6
    matrix = jnp.cos(jnp.outer(jnp.arange(1.0 * size), jnp.arange(1.0 * size))) / size

    def inner(x, theta):
        return 0.5 * jnp.sum(jnp.tanh(matrix @ x) ** 2) + 0.5 * jnp.sum((x - theta[0]) ** 2)

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum(x**2) + jnp.sum(theta))
    solver = bx.Descent(optax.sgd(0.1), 50)

    def flops(fn, theta):
        return jax.jit(fn).lower(theta).compile().cost_analysis()["flops"]

    def grad(theta):
        return bx.hypergradient(
            problem, jnp.ones(size), theta, inner_solver=solver, rule=bx.ForwardMode(), throw=False
        )[0].grad

    theta = jnp.ones(columns)
    product = 2 * size**2  # one step: forward, back; a column: one more of each
    # once inside the loop, and one gradient for the residual
    assert flops(grad, theta) < product * (2 + 2 * columns + 2) * 1.15
    compiled = jax.jit(grad).lower(theta).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * size * (columns + 1) * 12


def test_pytrees_scalars_float32_batches_and_an_empty_theta():
    def inner(x, theta):
        return 0.5 * jnp.sum((x["a"] - theta["s"]) ** 2) + 0.5 * jnp.sum(x["a"] * theta["w"]) ** 2

    problem = bx.Bilevel(inner, lambda x, theta: jnp.sum(x["a"] ** 2) * theta["s"])
    x0 = {"a": jnp.ones(2, jnp.float32), "none": None, "name": "a"}
    solver = bx.Descent(optax.sgd(0.3), 9)

    w = jnp.array([0.5, -1.0], jnp.float32)

    def grad(s):
        theta = {"s": s, "w": w, "kind": abs}
        return bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=bx.ForwardMode())[
            0
        ].grad

    def loop(s, w):
        a = x0["a"]
        for _ in range(9):
            a = a - 0.3 * (a - s + jnp.sum(a * w) * w)
        return jnp.sum(a**2) * s

    scalars = jnp.array([1.0, 0.3], jnp.float32)
    batched = jax.vmap(grad)(scalars)
    for k in range(2):
        expected = jax.grad(loop, argnums=(0, 1))(scalars[k], w)
        for name, value in zip(("s", "w"), expected, strict=True):
            assert batched[name].dtype == jnp.float32
            np.testing.assert_allclose(batched[name][k], value, rtol=1e-5)
    empty = bx.Bilevel(lambda x, t: jnp.sum((x - 1.0) ** 2), lambda x, t: jnp.sum(x))
    estimate, _ = bx.hypergradient(
        empty, jnp.zeros(2), {}, inner_solver=solver, rule=bx.ForwardMode()
    )
    assert estimate.grad == {}


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="has none that JAX can see"):
        bx.hypergradient(
            ORACLE.problem,
            ORACLE.x0,
            ORACLE.theta,
            inner_solver=bx.Given(),
            rule=bx.ForwardMode(),
        )
    for make in (lambda: bx.ForwardMode(0), lambda: bx.ForwardMode(batch_size=0)):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            make()
