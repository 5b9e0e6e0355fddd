"""Between the user's structure and floating-point arrays; every input is checked here, once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree, Scalar

from .._calls import naming
from .._one_mode import OneMode, mode_of
from .._tree import strong, tree_dtype
from ._bilevel import Bilevel, check_no_frames, copied
from ._condition import AbstractCondition, check_scalar


def as_arrays(tree: PyTree) -> PyTree:
    """`tree` with its Python and NumPy numbers as strong-typed JAX arrays.

    Not so the plain numbers inside a registered class (an Equinox module, a dataclass):
    those are settings, such as the rate of a dropout, and stay what they are.
    """
    parts, structure = jtu.tree_flatten(tree, is_leaf=_is_of_class)
    return strong(jtu.tree_unflatten(structure, [_part_as_arrays(part) for part in parts]))


def _part_as_arrays(part: Any) -> Any:
    if _is_of_class(part):
        return jtu.tree_map(lambda a: copied(a) if _is_array(a) else a, part)
    return copied(part) if _is_numeric(part) else part


def _is_of_class(node: Any) -> bool:
    """Whether a node of a pytree is of a registered class: no dict, list or tuple, no leaf."""
    return not isinstance(node, _PLAIN) and not jtu.all_leaves([node])


_PLAIN = (dict, list, tuple, type(None), jax.Array, np.ndarray, np.generic, int, float, complex)


def prepare(problem: Bilevel, x0: PyTree, theta: PyTree) -> tuple[Bilevel, PyTree, PyTree]:
    """Check the input once, at the door; below it nobody checks again.

    `bind` and `check_values`. Traced at the top of every compiled entry point, so that a
    second call pays nothing.
    """
    bound, start, theta_arrays = bind(problem, x0, theta)
    bound = check_values(bound, start_at(start, theta_arrays), theta_arrays)
    return bound, start, theta_arrays


def bind(problem: Bilevel, x0: PyTree, theta: PyTree) -> tuple[Bilevel, PyTree, PyTree]:
    """The problem as a function of floating-point arrays only.

    Returns the problem with the non-array leaves of `x` and `theta` bound into its
    functions, and `x0` and `theta` as pytrees of floating-point arrays only. `x0` may be
    a function of theta; it comes back as a function between such pytrees.
    """
    theta_arrays, theta_static = _split(theta, "theta")
    start = start_at(x0, theta)
    x_arrays, x_static = _split(as_arrays(start), "x0")
    _check_one_dtype(x_arrays)
    bound = problem
    if jtu.tree_leaves((x_static, theta_static)):
        statics = x_static, theta_static
        inner = problem.inner.map_functions(lambda fn: _Bound(fn, *statics))
        outer = _Bound(problem.outer, *statics)
        bound = eqx.tree_at(lambda p: (p.inner, p.outer), problem, (inner, outer))
    x_arrays = bound.inner.unknown(x_arrays, theta_arrays)
    if is_start_function(x0):
        x_arrays = _BoundStart(x0, theta_static, problem.inner)
    return bound, x_arrays, theta_arrays


def start_at(x0: PyTree, theta: PyTree) -> PyTree:
    """The starting point: `x0`, or `x0(theta)` if it is a function of theta."""
    if not is_start_function(x0):
        return x0
    with naming("x0", theta=theta):
        return x0(theta)


def is_start_function(x0: PyTree) -> bool:
    """Whether `x0` is a function of theta, and not a point.

    A model that holds arrays is a point, although it can be called; a partial or a bound
    method, which may hold some too, is a function.
    """
    if not callable(x0):
        return False
    if isinstance(x0, _BoundStart | jtu.Partial) or hasattr(x0, "__func__"):
        return True
    return not any(_is_array(leaf) for leaf in jtu.tree_leaves(x0))


def start_as_arrays(x0: PyTree) -> PyTree:
    """`as_arrays` of a starting point; a function of theta stays as it is."""
    return x0 if is_start_function(x0) else as_arrays(x0)


def restore(condition: AbstractCondition, x: PyTree, theta: PyTree) -> tuple[PyTree, PyTree]:
    """`x` and `theta` in the user's own structure: undoes the binding of `prepare`."""
    bound = _bound(condition)
    if bound is None:
        return x, theta
    return _put_back(x, bound.x_static), _put_back(theta, bound.theta_static)


def _put_back(arrays: PyTree, static: PyTree) -> PyTree:
    """`arrays` with the rest of the user's structure, if they have that structure and a rest."""
    structures = [jtu.tree_structure(tree, is_leaf=_is_none) for tree in (arrays, static)]
    return eqx.combine(arrays, static) if structures[0] == structures[1] else arrays


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _bound(condition: AbstractCondition) -> "_Bound | None":
    fn = condition.fn
    if isinstance(fn, OneMode) and isinstance(fn.fn, _Value):
        fn = fn.fn.condition.fn
    return fn if isinstance(fn, _Bound) else None


class _Bound(eqx.Module):
    """A user's function with the non-array leaves of `x` and `theta` put back."""

    fn: Callable
    x_static: PyTree
    theta_static: PyTree

    def __call__(self, x: PyTree, theta: PyTree, *data: PyTree) -> Any:
        return self.fn(_put_back(x, self.x_static), _put_back(theta, self.theta_static), *data)


class _BoundStart(eqx.Module):
    """`x0(theta)`, from and to pytrees of floating-point arrays."""

    fn: Callable
    theta_static: PyTree
    condition: AbstractCondition

    def __call__(self, theta: PyTree) -> PyTree:
        x0 = as_arrays(start_at(self.fn, _put_back(theta, self.theta_static)))
        return self.condition.unknown(_split(x0, "x0(theta)")[0], theta)


def _is_numeric(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) and not isinstance(leaf, bool)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _split(tree: PyTree, name: str) -> tuple[PyTree, PyTree]:
    """Floating-point arrays and the rest; integers and complex numbers are refused."""
    check_no_frames(tree, name)
    arrays, static = eqx.partition(tree, _is_array)
    for path, leaf in jtu.tree_leaves_with_path(arrays):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(_not_floating(f"{name}{jtu.keystr(path)}", dtype))
    if not jtu.tree_leaves(arrays):
        _check_settings(static, name)
    return arrays, static


def _not_floating(where: str, dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (
            f"`{where}` must be real; got dtype {dtype}. Split it into its real and imaginary "
            "parts, the pair (z.real, z.imag), and put them together in your functions: "
            "z = real + 1j * imag. Complex numbers in the data are fine."
        )
    advice = "Write 1.0 for 1, convert by jnp.asarray(..., dtype=float), or give constants as data."
    if "[" in where or "." in where:
        advice += (
            " A model whose state holds integers (a counter, the state of a random number "
            "generator) is split first: with Equinox `params, rest = eqx.partition(model, "
            "eqx.is_inexact_array)`, with Flax NNX `graph, params, rest = nnx.split(model, "
            "nnx.Param, ...)`. Give the parameters here and the rest in the data, and put them "
            "together in your functions by `eqx.combine(params, rest)` or "
            "`nnx.merge(graph, params, rest)`."
        )
    return f"`{where}` must be floating point, to be differentiated; got dtype {dtype}. {advice}"


def _check_settings(static: PyTree, name: str) -> None:
    """Raise if there is nothing to differentiate, but plain numbers that look like it."""
    for path, leaf in jtu.tree_leaves_with_path(static):
        if isinstance(leaf, float):
            where = f"{name}{jtu.keystr(path)}"
            raise TypeError(
                f"`{name}` has no variables: `{where}` is a plain Python number inside a class, "
                "which is a setting and stays as it is. Write jnp.asarray(...) for a variable."
            )


def _check_one_dtype(x: PyTree) -> None:
    """The inner variable is a vector: inner products of it need one precision."""
    dtypes = sorted({str(leaf.dtype) for leaf in jtu.tree_leaves(x)})
    if len(dtypes) > 1:
        raise TypeError(
            f"The leaves of `x0` must have one floating-point dtype; got {', '.join(dtypes)}. "
            "Convert them with jnp.asarray(..., dtype=...)."
        )


def check_values(problem: Bilevel, x: PyTree, theta: PyTree) -> Bilevel:
    """Shapes and dtypes of what the user's functions return, without computing them.

    Returns the problem in a form that can be differentiated in both modes.
    """
    inner = problem.inner
    out, inner_jaxpr = _traced(inner.__call__, x, theta)
    inner.check_output(out, x)
    (value, _), outer_jaxpr = _traced(problem.outer_value, x, theta)
    check_scalar(value, "outer")
    return eqx.tree_at(
        lambda p: (p.inner, p.outer),
        problem,
        (
            _inner_in_both_modes(inner, inner_jaxpr, x, theta),
            _outer_in_both_modes(problem, outer_jaxpr, x, theta),
        ),
    )


def _traced(fn: Callable, x: PyTree, theta: PyTree) -> tuple[Any, Any]:
    """What `fn(x, theta)` returns, its arrays as shapes, and the operations in it."""
    jaxpr, arrays, static = eqx.filter_make_jaxpr(fn)(x, theta)
    return eqx.combine(arrays, static), jaxpr


def in_both_modes(condition: AbstractCondition, x: PyTree, theta: PyTree) -> AbstractCondition:
    """The condition in a form that can be differentiated in both modes."""
    return _inner_in_both_modes(condition, _traced(condition.__call__, x, theta)[1], x, theta)


def _inner_in_both_modes(
    condition: AbstractCondition, jaxpr: Any, x: PyTree, theta: PyTree
) -> AbstractCondition:
    if isinstance(condition.fn, OneMode):
        return condition
    scalar = condition.objective
    fn, wanted = (condition.residual, "products") if scalar is None else (scalar, "second")
    mode = mode_of(fn, jaxpr, x, theta, wanted)
    if mode is None:
        return condition
    changes = {"has_aux": False} if hasattr(condition, "has_aux") else {}
    # The condition, and not its function: of what that returns, some is not used.
    fn = OneMode(_Value(dataclasses.replace(condition, data=None)), mode)
    return dataclasses.replace(condition, fn=fn, **changes)


def _outer_in_both_modes(problem: Bilevel, jaxpr: Any, x: PyTree, theta: PyTree) -> Callable:
    if isinstance(problem.outer, OneMode):
        return problem.outer
    mode = mode_of(lambda *at: problem.outer_value(*at)[0], jaxpr, x, theta, "gradient")
    if mode is None:
        return problem.outer
    data = () if problem.outer_data is None else (problem.outer_data,)
    has_aux = isinstance(eqx.filter_eval_shape(problem.outer, x, theta, *data), tuple)
    return OneMode(problem.outer, mode, has_aux)


class _Value(eqx.Module):
    """A condition as a function of its data, too."""

    condition: AbstractCondition

    def __call__(self, x: PyTree, theta: PyTree, data: PyTree = None) -> Any:
        return dataclasses.replace(self.condition, data=data)(x, theta)


def strong_convexity(condition: AbstractCondition, theta: PyTree) -> Scalar | None:
    """The modulus that the user has stated, at theta; `None` if none was."""
    modulus = getattr(condition, "strong_convexity", None)
    if not callable(modulus):
        return None if modulus is None else jnp.asarray(modulus, tree_dtype(theta))
    bound = _bound(condition)
    if bound is not None:
        theta = eqx.combine(theta, bound.theta_static)
    value: Any = modulus(theta)
    check_scalar(jax.eval_shape(lambda: value), "strong_convexity")
    return value
