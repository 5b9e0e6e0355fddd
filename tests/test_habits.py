"""Guesses by habit get an answer: other libraries' names and keywords."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx

PROBLEM = bx.Bilevel(
    lambda x, theta: jnp.sum((x - theta) ** 2), lambda x, theta: jnp.sum(x**2) + jnp.sum(theta)
)
POINT = (PROBLEM, jnp.zeros(2), jnp.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.NewtonCG(maxiter=3), r"bx.NewtonCG has no keyword `maxiter`. bx.NewtonCG and"),
        (lambda: bx.LBFGS(tol=1e-3), "called `rtol` or `atol`"),
        (lambda: bx.linear.CG(max_iter=3), "called `max_steps`"),
        (lambda: bx.Descent(optax.sgd(0.1), steps=3), "called `num_steps`"),
        (lambda: bx.Descent(lr=0.1, num_steps=3), r"optimizer=optax.adam\(...\)"),
        (lambda: bx.DoubleLoop(learning_rate=0.1), r"optimizer=optax.adam\(...\)"),
        (lambda: bx.DoubleLoop(rule=bx.Implicit()), "called `hypergradient`"),
        (lambda: bx.linear.GradientDescent(lr=0.1), "called `step_size`"),
        (lambda: bx.Implicit(solver=bx.linear.CG()), "called `linear_solver`"),
        (lambda: bx.solve(*POINT, max_iter=3), "called `num_steps`"),
        (lambda: bx.solve(*POINT, lr=0.1), r"bx.DoubleLoop\(optimizer=optax.adam\(0.1\)\)"),
        (lambda: bx.solve(*POINT, verbose=True), "called `progress`"),
        (lambda: bx.hypergradient(*POINT, tol=1e-3), r"inner_solver=bx.NewtonCG\(rtol=...\)"),
        (lambda: bx.hypergradient(*POINT, maxiter=3), r"bx.Optimistix\(solver, max_steps=...\)"),
        (lambda: bx.hypergradient(*POINT, solver=bx.linear.CG()), "called `inner_solver`"),
        (lambda: bx.hypergradient(PROBLEM, jnp.ones(2), thetaa=1.0), "Did you mean `theta`"),
        (lambda: bx.argmin(PROBLEM, step_size=0.1), "belongs to an Optax optimiser"),
        (lambda: bx.Bilevel(PROBLEM.outer, PROBLEM.outer, data=1.0), "called `inner_data`"),
    ],
)
def test_an_unknown_keyword_names_ours(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_errors_of_the_functions_below_stay_what_they_are():
    def inner(x, theta):
        return jnp.sum(x, maxiter=3)

    with pytest.raises(TypeError) as error:
        bx.hypergradient(bx.Bilevel(inner, PROBLEM.outer), *POINT[1:])
    assert "bx.hypergradient has no keyword" not in str(error.value)


def test_unknown_names_suggest_the_near_one():
    for wrong, message in {
        "Implict": r"Did you mean bx.Implicit\?",
        "newtoncg": r"Did you mean bx.NewtonCG\?",
        "hypergrad": r"Did you mean bx.hypergradient\?",
        "custom_root": r"bx.argmin\(bx.Root\(fn\), bx.Given\(\)\)",
        "nothing_like_it": r"no attribute 'nothing_like_it'.$",
    }.items():
        with pytest.raises(AttributeError, match=message):
            getattr(bx, wrong)


def test_the_pair_says_that_it_is_one():
    pair = bx.hypergradient(*POINT)
    with pytest.raises(AttributeError, match=r"estimate, state = bx.hypergradient\(...\)"):
        assert pair.grad
    with pytest.raises(AttributeError, match=r"no attribute 'other'.$"):
        assert pair.other
    estimate, state = jax.jit(lambda: bx.hypergradient(*POINT))()
    assert estimate.grad.shape == (2,) and pair.estimate.grad.shape == state.x.shape


def test_argmin_takes_the_inner_level_of_a_problem():
    assert bx.argmin(PROBLEM)(*POINT[1:]) == pytest.approx(1.0)
