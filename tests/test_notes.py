"""An error in a user's function names the function, its arguments and the user's line."""

import traceback

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

X0, THETA = jnp.zeros(5), jnp.ones(3)
DATA = {"z": jnp.ones((4, 2)), "y": np.ones(4)}


def wrong(x, theta, *data):
    return jnp.sum((data[0]["z"] if data else jnp.ones((4, 2))) @ x)  # the user's line


def fine(x, theta, *data):
    return jnp.sum(x**2) * jnp.sum(theta).astype(x.dtype)


VIEWS = {
    "hypergradient": lambda p, x0, theta: bx.hypergradient(p, x0, theta),
    "solve": lambda p, x0, theta: bx.solve(p, x0, theta, num_steps=1),
    "argmin": lambda p, x0, theta: bx.argmin(p.inner)(x0, theta),
    "check": lambda p, x0, theta: bx.check(p, x0, theta),
    "compare": lambda p, x0, theta: bx.compare(p, x0, theta),
}


@pytest.mark.parametrize(
    ("view", "level"),
    [(view, "inner") for view in VIEWS] + [(view, "outer") for view in VIEWS if view != "argmin"],
)
def test_the_function_its_arguments_and_the_line(view, level):
    functions = {"inner": fine, "outer": fine, level: wrong}
    problem = bx.Bilevel(**functions, **{f"{level}_data": DATA})
    with pytest.raises(TypeError) as error:
        VIEWS[view](problem, X0, THETA)
    notes = error.value.__notes__
    text = next(note for note in notes if "was called with" in note)
    assert f"`{level}` was called with x: float64[5], theta: float64[3], data: " in text
    assert "z: float64[4, 2]" in text and text.splitlines()[-1].endswith("# the user's line")
    assert sum("was called with" in note for note in notes) == 1
    assert text.splitlines()[0] in "".join(traceback.format_exception(error.value))


def test_lists_and_numpy_functions_get_a_word_of_advice():
    pull = lambda x, theta: jnp.sum((x - jnp.ones(2)) ** 2)
    with pytest.raises(TypeError) as error:
        bx.hypergradient(bx.Bilevel(pull, fine), [1.0, 2.0], THETA)
    assert "`x` is a list of numbers; for a vector write jnp.asarray" in error.value.__notes__[0]
    by_numpy = lambda x, theta: np.sum(np.sin(x) ** 2)
    with pytest.raises(TypeError) as error:
        bx.hypergradient(bx.Bilevel(by_numpy, fine), jnp.ones(2), THETA)
    assert any("use those of jax.numpy" in note for note in error.value.__notes__)


def test_other_functions_are_named_too():
    def name_of(**options):
        options = {"x0": X0} | options
        with pytest.raises(TypeError) as error:
            bx.hypergradient(bx.Bilevel(fine, fine), theta=THETA, **options)
        return "\n".join(error.value.__notes__)

    bad = lambda *arguments: jnp.ones((4, 2)) @ jnp.ones(5)
    assert "`x0` was called with theta: float64[3]" in name_of(x0=bad)
    text = name_of(inner_solver=bx.Traceable(bad))
    assert "`inner_solver` was called with x0: float64[5], theta: float64[3]" in text
    text = name_of(inner_solver=bx.External(bad))
    assert "`inner_solver` was called with x0: float64[5], theta: float64[3]" in text


class Frame:
    """As those of pandas and polars."""

    def to_numpy(self):
        return np.ones((4, 2))


def test_frames_say_how_to_convert_them():
    with pytest.raises(TypeError, match=r"`inner_data\['z'\]` is a Frame.*\.to_numpy\(\)"):
        bx.Bilevel(fine, fine, inner_data={"z": Frame()})
    with pytest.raises(TypeError, match=r"`outer_data` is a Frame.*\.to_numpy\(\)"):
        bx.Bilevel(fine, fine, outer_data=Frame())
    with pytest.raises(TypeError, match=r"`data` is a Frame.*\.to_numpy\(\)"):
        bx.argmin(bx.Minimum(fine, Frame()))(X0, THETA)
    for points in ((Frame(), THETA), (X0, Frame())):
        with pytest.raises(TypeError, match=r"is a Frame.*\.to_numpy\(\)"):
            bx.hypergradient(bx.Bilevel(fine, fine), *points)
