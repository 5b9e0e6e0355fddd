"""What comes back from a call can be saved, copied and sent to another process."""

import copy
import multiprocessing
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

WAYS = {
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Special(bx.SolveError):
    """As a user may derive one."""


def inner(x, theta):
    return jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2)


def outer(x, theta):
    return jnp.sum((x - 0.4) ** 2)


def raise_error(kind):
    raise kind("what happened", bx.RESULTS.singular)


@by_way
@pytest.mark.parametrize("kind", [bx.SolveError, Special])
def test_an_error_keeps_message_outcome_and_notes(way, kind):
    error = kind("what happened", bx.RESULTS.singular)
    error.add_note("a note")
    again = way(error)
    assert type(again) is kind and str(again) == "what happened"
    assert bool(again.result == bx.RESULTS.singular)
    assert again.__notes__ == ["a note"]


@by_way
def test_the_error_of_a_real_failure(way):
    problem = bx.Bilevel(lambda x, t: -jnp.sum(x**2) + t * jnp.sum(x), lambda x, t: jnp.sum(x))
    with pytest.raises(bx.SolveError) as caught:
        bx.hypergradient(problem, jnp.zeros(2), jnp.array(1.0))
    again = way(caught.value)
    assert str(again) == str(caught.value)
    assert bool(again.result == caught.value.result)


def test_a_pool_of_processes_passes_an_error_on():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        job = pool.apply_async(raise_error, (bx.SolveError,))
        with pytest.raises(bx.SolveError, match="what happened"):
            job.get(timeout=60)


@by_way
def test_estimates_states_and_solutions(way):
    problem, x0, theta = bx.Bilevel(inner, outer), jnp.zeros(3), jnp.zeros(3)
    estimate, state = bx.hypergradient(problem, x0, theta)
    again, state_again = way((estimate, state))
    np.testing.assert_array_equal(again.grad, estimate.grad)
    assert bool(again.result == bx.RESULTS.successful) and again.error_bound is None
    warm, _ = bx.hypergradient(problem, x0, theta, state=state_again)
    np.testing.assert_allclose(warm.grad, estimate.grad, rtol=1e-12)
    solution = bx.solve(problem, x0, theta, num_steps=2)
    assert str(way(solution)) == str(solution)
