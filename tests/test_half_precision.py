"""float16 and bfloat16: there are no factorisations, and products err in the third digit."""

import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import bilevax as bx

SIZE = 6
SCALE = jnp.linspace(1.0, 3.0, SIZE)
RIGHT = jnp.linspace(-1.0, 2.0, SIZE)


def problem(dtype):
    scale, right = SCALE.astype(dtype), RIGHT.astype(dtype)

    def inner(x, theta):
        return jnp.sum(scale * x**2 / 2 - right * x * theta)

    return bx.Bilevel(inner, lambda x, theta: jnp.sum((x - 1) ** 2))


EXACT = float(jnp.sum(2 * (RIGHT / SCALE - 1) * RIGHT / SCALE))
RULES = {
    "default": None,
    "Direct": bx.Implicit(bx.linear.Direct()),
    "CG": bx.Implicit(bx.linear.CG()),
    "MINRES": bx.Implicit(bx.linear.MINRES()),
    "GMRES": bx.Implicit(bx.linear.GMRES()),
    "Nystrom": bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.Nystrom(rank=2)),
    "Lineax LU": bx.Implicit(lx.LU()),
    "Lineax CG": bx.Implicit(lx.CG(1e-3, 1e-3)),
    "MinimumNorm": bx.MinimumNorm(),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in RULES), ("default", "float16")]
)
def test_every_solver_of_the_adjoint_system(name, dtype):
    estimate, _ = bx.hypergradient(
        problem(dtype), jnp.zeros(SIZE, dtype), jnp.ones((), dtype), rule=RULES[name], throw=False
    )
    assert estimate.grad.dtype == estimate.x.dtype == dtype
    # a sum that cancels, of numbers that are right to three digits
    np.testing.assert_allclose(float(estimate.grad), EXACT, rtol=0.1)


def test_an_equation():
    scale, right = SCALE.astype("bfloat16"), RIGHT.astype("bfloat16")
    condition = bx.Root(lambda x, theta: scale * x - theta * right)
    estimate, _ = bx.hypergradient(
        bx.Bilevel(condition, lambda x, theta: jnp.sum((x - 1) ** 2)),
        jnp.zeros(SIZE, "bfloat16"),
        jnp.ones((), "bfloat16"),
        throw=False,
    )
    np.testing.assert_allclose(float(estimate.grad), EXACT, rtol=0.1)


@pytest.mark.filterwarnings("ignore")  # rounding stalls a step
def test_a_run():
    theta = jnp.ones((), "bfloat16")
    solution = bx.solve(problem("bfloat16"), jnp.zeros(SIZE, "bfloat16"), theta, num_steps=2)
    assert solution.theta.dtype == jnp.bfloat16
    assert float(solution.theta) != 1
