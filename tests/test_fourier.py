"""Fourier transforms inside the problem: XLA on CPUs cannot run every batch of them."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import bilevax as bx
from bilevax._tree import dense_columns, has_fourier_transform, map_rows
from bilevax.testing import relative_error

SIZE = 16  # the default is then the matrix, column by column
SIGNAL = jnp.sin(jnp.arange(float(SIZE)))


def inner(x, theta):
    """Deconvolution with a strength for every frequency."""
    spectrum = jnp.fft.rfft(x)
    penalty = jnp.sum(jnp.exp(theta) * (spectrum.real**2 + spectrum.imag**2)) / SIZE
    return jnp.sum((x - SIGNAL) ** 2) + penalty


def outer(x, theta):
    return jnp.sum((x - 0.3) ** 2)


def solution(theta):
    """In closed form: every frequency is shrunk by itself."""
    full = jnp.concatenate([jnp.exp(theta), jnp.zeros(SIZE - SIZE // 2 - 1)])
    weights = 0.5 * (full + jnp.roll(full[::-1], 1))
    return jnp.fft.ifft(jnp.fft.fft(SIGNAL) * (1 / (1 + weights)).astype(complex)).real


PROBLEM = bx.Bilevel(inner, outer)
X0, THETA = jnp.zeros(SIZE), 0.3 * jnp.cos(jnp.arange(SIZE // 2 + 1.0))


def exact_gradient():
    return jax.grad(lambda theta: outer(solution(theta), theta))(THETA)


@pytest.mark.parametrize(
    "rule",
    [
        None,
        bx.Implicit(bx.linear.CG(rtol=1e-10), preconditioner=bx.precondition.Nystrom(rank=8)),
        bx.Implicit(lx.Cholesky()),
    ],
    ids=["default", "sketch", "Lineax"],
)
def test_every_way_to_a_hypergradient(rule):
    estimate, _ = bx.hypergradient(PROBLEM, X0, THETA, rule=rule)
    assert relative_error(estimate.grad, exact_gradient()) < 1e-10


def test_jacobians():
    x_star = bx.argmin(inner)
    exact = jax.jacobian(solution)(THETA)
    out = jax.jit(jax.jacrev(lambda theta: x_star(X0, theta)))(THETA)
    np.testing.assert_allclose(out, exact, atol=1e-12)
    np.testing.assert_allclose(
        bx.jacobian(PROBLEM, solution(THETA), THETA).value, exact, atol=1e-12
    )


def filtered(x, factors):
    return jnp.fft.irfft(jnp.fft.rfft(x) * factors.astype(complex), n=SIZE)


def test_equations_and_batches():
    def equation(x, theta):
        return filtered(x, 1 + jnp.exp(theta)) - SIGNAL

    def value(theta):
        return outer(filtered(SIGNAL, 1 / (1 + jnp.exp(theta))), theta)

    problem = bx.Bilevel(bx.Root(equation), outer)

    def grad(theta):
        return bx.hypergradient(problem, X0, theta, rule=bx.Implicit(bx.linear.Direct()))[0].grad

    thetas = jnp.stack([THETA, -THETA])
    np.testing.assert_allclose(jax.vmap(grad)(thetas), jax.vmap(jax.grad(value))(thetas), atol=1e-9)


def test_a_transform_is_found_wherever_it_is():
    def in_a_branch(x):
        return jax.lax.cond(x[0] > 0, lambda: jnp.fft.rfft(x).real, lambda: x[: x.size // 2 + 1])

    def in_a_loop(x):
        return jax.lax.fori_loop(0, 2, lambda _, y: jnp.fft.fft(y).real, x)

    @jax.custom_jvp
    def with_a_rule(x):
        return jnp.fft.fft(x).real

    with_a_rule.defjvp(lambda p, t: (with_a_rule(*p), with_a_rule(*t)))
    x = jnp.ones(4)
    for fn in (in_a_branch, in_a_loop, with_a_rule, jax.jit(with_a_rule)):
        assert has_fourier_transform(fn, x)
    assert not has_fourier_transform(jnp.sin, x)


def test_rows_are_mapped_to_the_same_numbers():
    matrix = jnp.arange(9.0).reshape(3, 3)
    rows = {"a": jnp.eye(3)}
    out = map_rows(lambda v: {"a": matrix @ v["a"]}, rows)
    np.testing.assert_array_equal(out["a"], matrix.T)
    spectrum = map_rows(lambda v: jnp.fft.fft(v["a"]).real, rows, batch_size=2)
    np.testing.assert_allclose(spectrum, np.fft.fft(np.eye(3)).real, atol=1e-15)
    np.testing.assert_array_equal(dense_columns(lambda v: matrix @ v, jnp.zeros(3)), matrix.T)
