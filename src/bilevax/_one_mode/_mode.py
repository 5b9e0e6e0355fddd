"""In which modes a function can be differentiated: found by trying, without computing."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree, Scalar

from .._tree import tree_dot
from ._refusal import REFUSALS

Mode = Literal["reverse", "forward", "neither"]

# What is wanted of a function: its gradient; both kinds of product with its derivative;
# the gradient, and products with its derivative.
Wanted = Literal["gradient", "products", "second"]


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
        return "forward"
    # Rules that go by values only need nothing of theta.
    is_of_x = _works(both, lambda x, _: fn(x, theta), x, ())
    return None if is_of_x else "neither"


def lacks_a_mode(jaxpr: Any) -> bool:
    """Whether there is anything in it that may lack one of the modes."""
    return _has(jaxpr, lambda name: name == "while" or name.startswith("custom_vjp"))


def _has(jaxpr: Any, is_meant: Callable[[str], bool]) -> bool:
    """Whether it, or what it calls, has an operation whose name is meant."""
    for equation in jaxpr.eqns:
        values = jtu.tree_leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr)
        if is_meant(equation.primitive.name):
            return True
        if any(_has(value, is_meant) for value in values if _is_jaxpr(value)):
            return True
    return False


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _works(trial: Callable, fn: Callable, x: PyTree, theta: PyTree) -> bool:
    try:
        jaxpr = jax.make_jaxpr(lambda *at: trial(fn, at))(x, theta)
    except REFUSALS:
        return False
    # What JAX puts in the place of the tangent of a custom_vjp: an error for the compiler.
    return not _has(jaxpr, lambda name: name == "custom_lin")


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
