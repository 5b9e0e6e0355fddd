"""What people see when they print what the library gives them."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import bilevax as bx


def inner(x, theta):
    return 0.5 * jnp.sum((x - theta) ** 2)


def outer(x, theta):
    return jnp.sum(x**2)


PROBLEM = bx.Bilevel(inner, outer)


@pytest.fixture(scope="module")
def estimate():
    return bx.hypergradient(PROBLEM, jnp.ones(3), jnp.arange(3.0))[0]


# ---- outcomes -------------------------------------------------------------------------


def test_an_outcome_prints_its_name_and_what_to_do():
    assert str(bx.RESULTS.successful) == "successful"
    text = str(bx.RESULTS.singular)
    assert text.startswith("singular: The adjoint system") and "MinimumNorm" in text
    assert bx.RESULTS[bx.RESULTS.successful] == ""
    assert f"singular: {bx.RESULTS[bx.RESULTS.singular]}" == text
    with pytest.raises(TypeError, match="takes an outcome; got str"):
        bx.RESULTS["singular"]


def test_an_outcome_compares_with_names(estimate):
    assert estimate.result == "successful"
    assert estimate.result != "singular"
    assert estimate.result == "successful"
    with pytest.raises(ValueError, match="'sucessful'. Did you mean 'successful'"):
        _ = estimate.result == "sucessful"
    assert (estimate.result == 3) is False
    assert estimate.result is not None and estimate.result != None  # noqa: E711
    assert all(getattr(bx.RESULTS, name) == name for name in bx.RESULTS.names())
    assert len(set(bx.RESULTS.names())) == len(bx.RESULTS.names()) > 10


def test_outcomes_in_batches_and_programs():
    @jax.jit
    @jax.vmap
    def judge(a):
        return bx.RESULTS.where(a > 0, bx.RESULTS.successful, bx.RESULTS.stalled)

    results = judge(jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(results == "stalled", [False, True])
    np.testing.assert_array_equal(results != bx.RESULTS.stalled, [True, False])
    assert str(results) == "['successful' 'stalled']"
    names = []
    jax.jit(lambda r: names.append((r.name, repr(r), bx.RESULTS[r])))(bx.RESULTS.stalled)
    assert names == [("traced", "traced", "traced")]
    again = pickle.loads(pickle.dumps(results))
    np.testing.assert_array_equal(again == results, True)


# ---- estimates ------------------------------------------------------------------------


def test_an_estimate_prints_its_numbers_on_one_line(estimate):
    text = str(estimate)
    assert "\n" not in text and len(text) < 250
    for part in ("value 5,", "norm of grad 4.47 (3 entries)", "inner residual", "asked: "):
        assert part in text
    assert text.endswith("; successful)")
    # the same in a list, in a pair and after a way through a file
    assert repr(pickle.loads(pickle.dumps(estimate))) == text in str([estimate])


def test_a_flagged_estimate_says_what_to_do():
    saddle = bx.Bilevel(lambda x, t: 0.5 * x[0] ** 2 - 0.5 * x[1] ** 2 + x @ t, outer)
    estimate, _ = bx.hypergradient(
        saddle, jnp.zeros(2), jnp.zeros(2), inner_solver=bx.Given(), throw=False
    )
    assert "negative_curvature: Negative curvature was met" in str(estimate)


def test_batches_and_tracers_of_estimates_print(estimate):
    batch = jax.tree_util.tree_map(lambda a: jnp.stack([a, a]), estimate)
    assert str(batch) == "Estimate(batch of (2,): 2 successful)"
    seen = []
    jax.jit(lambda e: seen.append(str(e)))(estimate)
    dtype = eqx.tree_pformat(estimate.grad)
    assert seen == [f"Estimate(traced: grad {dtype}, x {dtype})"]
    assert "None" in str(jax.tree_util.tree_map(lambda _: None, estimate))


# ---- what is asked for ----------------------------------------------------------------


AS_WRITTEN = [
    (bx.DoubleLoop(), "bx.DoubleLoop()"),
    (bx.DoubleLoop(optimizer=optax.adam(0.1)), "bx.DoubleLoop()"),
    (
        bx.DoubleLoop(bx.LBFGS(0.1), bx.Implicit(bx.linear.CG(rtol=1e-3)), start="cold"),
        (
            "bx.DoubleLoop(bx.LBFGS(0.1), "
            "hypergradient=bx.Implicit(bx.linear.CG(0.001)), start='cold')"
        ),
    ),
    (
        bx.DoubleLoop(optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.5))),
        "bx.DoubleLoop(optimizer=optax.chain(clip_by_global_norm, scale_by_adam, scale(-0.5)))",
    ),
    (
        bx.DoubleLoop(optimizer=optx.BFGS(1e-6, 1e-6)),
        "bx.DoubleLoop(optimizer=BFGS(1e-06, atol=1e-06))",
    ),
    (bx.KStep(3, step_size=jnp.array(0.25)), "bx.KStep(3, step_size=0.25)"),
    (bx.Descent(optax.sgd(0.1), 20), "bx.Descent(scale(-0.1), num_steps=20)"),
    (
        bx.Implicit(preconditioner=bx.precondition.Jacobi()),
        "bx.Implicit(preconditioner=bx.precondition.Jacobi())",
    ),
    (PROBLEM, "bx.Bilevel(bx.Minimum(inner), outer=outer)"),
    (bx.Minimum(inner, data=jnp.ones((2, 3))), "bx.Minimum(inner, data="),
    (bx.Given(), "bx.Given()"),
]


@pytest.mark.parametrize(("made", "text"), AS_WRITTEN, ids=lambda p: type(p).__name__)
def test_what_was_asked_for_prints_as_one_would_write_it(made, text):
    assert repr(made).startswith(text)
    assert "\n" not in repr(made) and len(repr(made)) < 200
    traced = []
    eqx.filter_jit(lambda made: traced.append(repr(made)))(made)
    assert "\n" not in traced[0]
