"""Functions that JAX differentiates in one mode only, against the same ones in both modes."""

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.experimental.ode import odeint

import bilevax as bx
from bilevax._one_mode import OneMode
from bilevax._one_mode._reverse import by_reverse
from bilevax._problem import prepare


@jax.custom_vjp
def product(a, b):
    return a * b


product.defvjp(lambda a, b: (a * b, (a, b)), lambda ab, c: (product(c, ab[1]), product(c, ab[0])))


@jax.custom_vjp
def half_square(r):
    """Its backward pass is a custom_vjp, too."""
    return 0.5 * jnp.sum(r**2)


half_square.defvjp(
    lambda r: (half_square(r), r), lambda r, c: (product(r, jnp.broadcast_to(c, r.shape)),)
)


@jax.custom_vjp
def softplus(z):
    return jax.nn.softplus(z)


softplus.defvjp(lambda z: (softplus(z), z), lambda z, c: (c * (0.5 + 0.5 * jnp.tanh(z / 2)),))


def cube(z):
    """By the loop of a library, of which JAX does not know how long it is."""
    start = jnp.asarray(0, jnp.int32), jnp.ones_like(z)
    return eqxi.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * z), start, kind="lax")[1]


MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
TARGETS = jnp.asarray([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
X0, THETA = jnp.zeros(3), jnp.array([0.1, -0.2, 0.3])


def ridge(x, theta):
    return half_square(MATRIX @ x - TARGETS) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def ridge_solution(theta):
    return jnp.linalg.solve(MATRIX.T @ MATRIX + jnp.diag(jnp.exp(theta)), MATRIX.T @ TARGETS)


def logistic(fn):
    def inner(x, theta):
        losses = fn(-TARGETS * (MATRIX @ x))
        return jnp.sum(losses) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

    return inner


def quartic(fn):
    """The square of a cubic."""

    def inner(x, theta):
        return 0.5 * jnp.sum((x - 1) ** 2) + 0.1 * jnp.sum(fn(x - theta) ** 2)

    return inner


def outer(x, theta):
    return jnp.sum((x - 0.3) ** 2) + 0.1 * jnp.sum(theta)


def composed(x_star):
    return lambda theta: outer(x_star(theta), theta)


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_solver": bx.LBFGS(rtol=1e-12)}, {"rule": bx.Accurate(1e-8)}],
    ids=["default", "LBFGS", "accuracy"],
)
def test_reverse_mode_only(options):
    estimate, _ = bx.hypergradient(bx.Bilevel(ridge, outer), X0, THETA, **options)
    np.testing.assert_allclose(estimate.grad, jax.grad(composed(ridge_solution))(THETA), rtol=1e-8)


@pytest.mark.parametrize(
    ("one_mode", "both_modes"),
    [
        (logistic(softplus), logistic(jax.nn.softplus)),
        (quartic(cube), quartic(lambda z: z**3)),
    ],
    ids=["reverse", "forward"],
)
def test_argmin_in_every_mode(one_mode, both_modes):
    def all_of(inner):
        x_star = bx.argmin(inner)
        value = composed(lambda theta: x_star(X0, theta))
        grad = jax.grad(value)
        return jax.jit(lambda theta: (grad(theta), jax.jacfwd(value)(theta)))(THETA)

    for a, b in zip(all_of(one_mode), all_of(both_modes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_the_hessian_of_an_argmin_and_a_closure():
    def value(theta, shift):
        def inner(x, theta):
            return ridge(x, theta) + shift * jnp.sum(x)

        return outer(bx.argmin(inner)(X0, theta), theta)

    def exact(theta, shift):
        matrix = MATRIX.T @ MATRIX + jnp.diag(jnp.exp(theta))
        return outer(jnp.linalg.solve(matrix, MATRIX.T @ TARGETS - shift), theta)

    out = jax.jit(jax.jacfwd(jax.grad(value), (0, 1)))(THETA, 0.3)
    for a, b in zip(out, jax.jacfwd(jax.grad(exact), (0, 1))(THETA, 0.3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_outer_steps_by_either_mode():
    def outer_by_loop(x, theta):
        return jnp.sum(cube(x - 0.3)) + 0.1 * jnp.sum(theta), {"cubes": cube(x), "names": "abc"}

    problem = bx.Bilevel(ridge, outer_by_loop)
    estimate, _ = bx.hypergradient(problem, X0, THETA)

    def value(theta):
        return jnp.sum((ridge_solution(theta) - 0.3) ** 3) + 0.1 * jnp.sum(theta)

    np.testing.assert_allclose(estimate.grad, jax.grad(value)(THETA), rtol=1e-9)
    np.testing.assert_allclose(estimate.aux["cubes"], estimate.x**3, rtol=1e-12)
    solution = bx.solve(bx.Bilevel(ridge, outer), X0, THETA, num_steps=3)
    same = bx.solve(bx.Bilevel(ridge_in_both_modes, outer), X0, THETA, num_steps=3)
    np.testing.assert_allclose(solution.theta, same.theta, rtol=1e-9)
    assert bx.check(bx.Bilevel(ridge, outer), ridge_solution(THETA), THETA).ok


def ridge_in_both_modes(x, theta):
    return 0.5 * jnp.sum((MATRIX @ x - TARGETS) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


@pytest.mark.parametrize(
    ("condition", "solver"),
    [
        (bx.Root(lambda x, theta: (softplus(x) + x - theta, "aux"), has_aux=True), None),
        (bx.FixedPoint(lambda x, theta: 0.5 * (theta - softplus(x) + x)), None),
        (
            bx.LeastSquares(lambda x, theta: (softplus(x) + x - theta, "aux"), has_aux=True),
            optx.LevenbergMarquardt(1e-10, 1e-10),
        ),
    ],
    ids=["root", "fixed point", "least squares"],
)
def test_other_conditions(condition, solver):
    estimate, _ = bx.hypergradient(bx.Bilevel(condition, outer), X0, THETA, inner_solver=solver)
    slope = jax.nn.sigmoid(estimate.x) + 1
    np.testing.assert_allclose(jax.nn.softplus(estimate.x) + estimate.x, THETA, atol=1e-6)
    np.testing.assert_allclose(estimate.grad, 2 * (estimate.x - 0.3) / slope + 0.1, rtol=1e-5)


def decay(x, rate):
    return odeint(lambda y, _, rate: -rate * y, x, jnp.array([0.0, 1.0]), rate)[-1]


def test_an_ode_in_either_level():
    start = jnp.zeros(())

    def inner(x, theta):
        return 0.5 * (x - 2) ** 2 + 0.5 * (decay(x, jnp.exp(theta)) - 0.3) ** 2

    def level(x, theta):
        return (decay(x, jnp.exp(theta)) - 0.2) ** 2

    def value(theta):
        factor = jnp.exp(-jnp.exp(theta))
        x = (2 + 0.3 * factor) / (1 + factor**2)
        return (x * factor - 0.2) ** 2

    theta = jnp.array(0.2)
    problem = bx.Bilevel(inner, level)
    estimate, _ = bx.hypergradient(problem, start, theta, inner_solver=bx.NewtonCG(dense=False))
    np.testing.assert_allclose(estimate.grad, jax.grad(value)(theta), rtol=1e-5)


def test_too_many_variables_for_forward_mode():
    problem = bx.Bilevel(quartic(cube), outer)
    with pytest.raises(ValueError, match=r"there are 70, more than 64.*jax\.lax\.scan"):
        bx.hypergradient(problem, jnp.zeros(70), jnp.zeros(70))


@pytest.mark.skipif(jax.__version_info__[:2] == (0, 7), reason="JAX 0.7 itself fails there")
def test_a_loop_of_the_user_can_be_a_scan():
    def fourth_power(z):
        done = jax.lax.while_loop(
            lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] * z), (0, 1.0 + 0 * z)
        )
        return done[1]

    problem = bx.Bilevel(lambda x, t: jnp.sum(fourth_power(x) - t * x), outer)
    with pytest.raises(ValueError, match="while_loop.*scan"):
        bx.hypergradient(problem, X0, THETA)


@jax.custom_vjp
def dead_end(z):
    return jnp.sum(z**2)


def dead_end_backward(z, c):
    return (jax.lax.while_loop(lambda s: s[0] < 1.0, lambda s: (s[0] + 1, 2 * c * z), (0.0, z))[1],)


dead_end.defvjp(lambda z: (dead_end(z), z), dead_end_backward)


def test_what_has_too_few_derivatives_says_what_to_do():
    with pytest.raises(TypeError, match=r"cannot be differentiated as often.*jax\.custom_jvp"):
        bx.hypergradient(bx.Bilevel(lambda x, t: dead_end(x - t), outer), X0, THETA)


def test_functions_with_both_modes_stay_as_they_are():
    def with_a_loop(x, theta):
        steps = jax.lax.while_loop(lambda c: c < 2.0, lambda c: c + 1, 0.0)
        return jnp.sum((x - theta) ** 2) + jax.lax.stop_gradient(steps)

    for inner in (ridge_in_both_modes, with_a_loop):
        problem, *_ = prepare(bx.Bilevel(inner, outer), X0, THETA)
        assert not isinstance(problem.inner.fn, OneMode)
        assert not isinstance(problem.outer, OneMode)


def test_products_under_every_transformation():
    def fn(z):
        return [jnp.sum(softplus(z) ** 2), product(z[:2], z[1:])]

    def same(z):
        return [jnp.sum(jax.nn.softplus(z) ** 2), z[:2] * z[1:]]

    def changed(z):
        return by_reverse(lambda arrays: fn(arrays[0]))([z])

    batch = jnp.stack([THETA, 2 * THETA])
    weights = [2.0, jnp.ones(2)]

    def pulled(f):
        return lambda z: jax.vjp(f, z)[1](weights)[0]

    for of in (
        lambda f: jax.jacfwd(jax.jacrev(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.jacfwd(jax.jacfwd(pulled(f))),
        lambda f: jax.jacrev(lambda z: jax.linearize(pulled(f), z)[1](z)),
    ):
        out, exact = (jax.jit(jax.vmap(of(f)))(batch) for f in (changed, same))
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
