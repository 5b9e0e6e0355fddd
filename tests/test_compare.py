"""`compare`: errors against closed forms, counts, curves, flags, tables and the picture."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


def inner(x, theta):
    return jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2)


def outer(x, theta):
    del theta
    return jnp.sum((x - 0.4) ** 2)


PROBLEM = bx.Bilevel(inner, outer)
X0, THETA = jnp.zeros(2), jnp.array([-1.0, 0.5])
STEP, NUM_STEPS = 0.1, 12


def after_steps(theta, num_steps):
    """Gradient descent from zero, by hand."""
    x = X0
    for _ in range(num_steps):
        x = x - STEP * (2 * (x - 1.0) + 2 * jnp.exp(theta) * x)
    return x


def exact_gradient():
    x = 1 / (1 + np.exp(THETA))
    return -2 * (x - 0.4) * x * (1 - x)


@pytest.fixture(scope="module")
def found():
    descent = bx.Descent(optax.sgd(STEP), num_steps=NUM_STEPS)
    rules = {
        "implicit": bx.Implicit(inexact=True),
        "unrolled": bx.Unrolled(),
        "wrong": bx.Implicit(bx.linear.Neumann(20, step_size=10.0), inexact=True),
    }
    return bx.compare(PROBLEM, X0, THETA, rules, inner_solver=descent, num_rounds=2, verbose=False)


def relative(grad):
    return np.linalg.norm(grad - exact_gradient()) / np.linalg.norm(exact_gradient())


def test_errors_are_those_of_the_closed_forms(found):
    unrolled = jax.grad(lambda theta: outer(after_steps(theta, NUM_STEPS), theta))(THETA)
    x, e = after_steps(THETA, NUM_STEPS), np.exp(THETA)
    implicit = -2 * (x - 0.4) * 2 * e * x / (2 + 2 * e)
    rows = {row.name: row for row in found.rows}
    assert rows["unrolled"].error == pytest.approx(relative(unrolled), rel=1e-6)
    assert rows["implicit"].error == pytest.approx(relative(implicit), rel=1e-6)
    assert found.reference_error < 1e-8
    assert found.hypergradient_norm == pytest.approx(np.linalg.norm(exact_gradient()))


def test_the_two_curves_are_those_of_the_first_k_steps(found):
    curve, x_star = found.curve, 1 / (1 + np.exp(THETA))
    assert curve.num_steps[0] == 1
    assert curve.num_steps[-1] == NUM_STEPS
    for k, implicit, unrolled, distance in zip(
        curve.num_steps, curve.implicit, curve.unrolled, curve.distance, strict=True
    ):
        x, e = after_steps(THETA, k), np.exp(THETA)
        by_steps = jax.grad(lambda theta, k=k: outer(after_steps(theta, k), theta))(THETA)
        assert unrolled == pytest.approx(relative(by_steps), rel=1e-6)
        assert implicit == pytest.approx(relative(-2 * (x - 0.4) * 2 * e * x / (2 + 2 * e)))
        assert distance == pytest.approx(np.linalg.norm(x - x_star) / np.linalg.norm(x_star))


def test_the_work_is_counted_and_timed(found):
    unrolled = next(row for row in found.rows if row.name == "unrolled")
    assert unrolled.num_inner_steps == NUM_STEPS
    assert unrolled.num_cross_products == NUM_STEPS
    assert all(row.forward_seconds > 0 and row.backward_seconds >= 0 for row in found.rows)
    assert unrolled.memory_bytes > 0
    assert all(row.outcome for row in found.rows)


def test_a_bad_outcome_is_shown(found):
    wrong = next(row for row in found.rows if row.name == "wrong")
    assert wrong.outcome == "diverged"
    assert "diverged" in str(found)


def test_the_record_is_a_table_and_json(found):
    assert json.loads(json.dumps(found.to_dict()))["size_x"] == 2
    records = found.to_records()
    assert [record["name"] for record in records] == [row.name for row in found.rows]
    assert len({tuple(record) for record in records}) == 1
    text = str(found)
    assert all(row.name in text for row in found.rows)
    assert "backward" in text


def test_the_picture(found, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    figure = found.plot(tmp_path / "rules.png")
    assert (tmp_path / "rules.png").stat().st_size > 10_000
    assert len(figure.axes) == 2
    assert len(figure.axes[0].lines) == 3


def test_a_rule_that_cannot_be_used_has_a_line():
    equation = bx.Bilevel(bx.Root(lambda x, theta: x + 0.1 * x**3 - theta), outer)
    rules = [bx.Implicit(bx.linear.CG()), bx.Implicit()]
    found = bx.compare(
        equation, X0, THETA, rules, inner_solver=bx.Given(), num_rounds=1, verbose=False
    )
    absent, usable = found.rows
    assert not absent.is_usable
    assert "CG needs" in absent.message
    assert "not usable" in str(found)
    assert np.isnan(absent.error)
    assert usable.is_usable
    assert found.curve is None


def test_a_learned_step_size_is_judged_by_the_steps():
    descent = bx.Descent(lambda theta: optax.sgd(jnp.exp(theta)), num_steps=3)
    plain = bx.Bilevel(lambda x, theta: jnp.sum((x - 1.0) ** 2), outer)
    found = bx.compare(
        plain,
        X0,
        jnp.array(-2.0),
        [bx.Unrolled(), bx.Implicit(inexact=True)],
        inner_solver=descent,
        num_rounds=1,
        verbose=False,
    )
    assert "derivative of the steps" in found.reference
    assert found.rows[0].error < 1e-12
    assert found.rows[1].error == pytest.approx(1.0)  # it is zero


def test_a_reference_of_ones_own_and_the_printed_table(capsys):
    found = bx.compare(
        PROBLEM, X0, THETA, [bx.Unrolled()], reference=exact_gradient(), num_steps=5, num_rounds=1
    )
    assert found.reference == "the gradient given"
    assert "stand in for bx.NewtonCG()" in capsys.readouterr().out
    assert 0 < found.rows[0].error < 1
    assert found.rows[0].num_inner_steps == 5


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="takes rules"):
        bx.compare(PROBLEM, X0, THETA, [bx.linear.CG()])
    with pytest.raises(ValueError, match="no rule"):
        bx.compare(PROBLEM, X0, THETA, [])
    with pytest.raises(ValueError, match="structure of theta"):
        bx.compare(PROBLEM, X0, THETA, [bx.Implicit()], reference=jnp.zeros(3))
    with pytest.raises(TypeError, match="host"):
        jax.jit(lambda theta: bx.compare(PROBLEM, X0, theta))(THETA)
