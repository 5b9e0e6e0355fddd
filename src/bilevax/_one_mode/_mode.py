"""In which modes a function can be differentiated: found by trying, without computing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree, Scalar

from .._reach._code import is_library_file
from .._tree import tree_dot
from ._refusal import REFUSALS

Mode = Literal["reverse", "forward", "neither"]

# What is wanted of a function: its gradient; both kinds of product with its derivative;
# the gradient, and products with its derivative.
Wanted = Literal["gradient", "products", "second"]

_JAX = str(Path(jax.__file__).parent)


def mode_of(
    fn: Callable[[PyTree, PyTree], PyTree], jaxpr: Any, x: PyTree, theta: PyTree, wanted: Wanted
) -> Mode | None:
    """The only mode that does what is wanted of `fn(x, theta)`; `None` if nothing is amiss.

    `jaxpr` is `fn` as it was traced already: if nothing in it lacks a mode, nothing is tried.
    """
    if not lacks_a_mode(jaxpr):
        return None
    both, reverse, forward = _TRIALS[wanted]
    if _works(both, fn, x, theta):
        return None
    if _works(reverse, fn, x, theta):
        return "reverse"
    if _works(forward, fn, x, theta):
        # JAX' own error says to write a scan, whose gradient costs one pass back. Only the
        # loop of a library (a differential equation in forward mode) cannot be rewritten.
        return None if any(map(_is_own_loop, _equations(jaxpr))) else "forward"
    # Rules that go by values only need nothing of theta.
    is_of_x = _works(both, lambda x, _: fn(x, theta), x, ())
    return None if is_of_x else "neither"


def lacks_a_mode(jaxpr: Any) -> bool:
    """Whether there is anything in it that may lack one of the modes."""
    names = (equation.primitive.name for equation in _equations(jaxpr))
    return any(name == "while" or name.startswith("custom_vjp") for name in names)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Its operations, and those of what it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jtu.tree_leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _equations(value)


def _is_own_loop(equation: Any) -> bool:
    """Whether it is a `while_loop` that user code, and not a library, has called."""
    if equation.primitive.name != "while" or equation.source_info.traceback is None:
        return False
    files = (frame.file_name for frame in equation.source_info.traceback.frames)
    caller = next((file for file in files if not file.startswith(_JAX)), None)
    return not is_library_file(caller)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _works(trial: Callable, fn: Callable, x: PyTree, theta: PyTree) -> bool:
    try:
        jaxpr = jax.make_jaxpr(lambda *at: trial(fn, at))(x, theta)
    except REFUSALS:
        return False
    # What JAX puts in the place of the tangent of a custom_vjp: an error for the compiler.
    return all(equation.primitive.name != "custom_lin" for equation in _equations(jaxpr))


def _gradient(fn: Callable, at: tuple) -> PyTree:
    return jax.grad(lambda at: fn(*at))(at)


def _slope(fn: Callable, at: tuple) -> Scalar:
    return jax.jvp(lambda at: fn(*at), (at,), (at,))[1]


def _second(fn: Callable, at: tuple) -> PyTree:
    return jax.jvp(lambda at: _gradient(fn, at), (at,), (at,))


def _second_by_reverse(fn: Callable, at: tuple) -> PyTree:
    return jax.grad(lambda moved: tree_dot(_gradient(fn, moved), at))(at)


def _second_by_forward(fn: Callable, at: tuple) -> PyTree:
    return jax.jvp(lambda at: _slope(fn, at), (at,), (at,))


def _pulled(fn: Callable, at: tuple) -> tuple[PyTree, Callable]:
    out, pull = jax.vjp(lambda at: fn(*at), at)
    return out, lambda w: pull(w)[0]


def _products(fn: Callable, at: tuple) -> PyTree:
    out, pull = _pulled(fn, at)
    return _slope(fn, at), pull(out)


def _products_by_reverse(fn: Callable, at: tuple) -> PyTree:
    out, pull = _pulled(fn, at)
    return jax.grad(lambda w: tree_dot(pull(w), at))(out)


# For each wish: by both modes, by reverse mode alone, by forward mode alone.
_TRIALS: dict[Wanted, tuple[Callable, Callable, Callable]] = {
    "gradient": (_gradient, _gradient, _slope),
    "products": (_products, _products_by_reverse, _slope),
    "second": (_second, _second_by_reverse, _second_by_forward),
}
