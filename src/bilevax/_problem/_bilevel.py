"""The bilevel problem."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._as_written import OneLine
from ._condition import AbstractCondition, Minimum, call


class Bilevel(OneLine, eqx.Module):
    """The bilevel problem `min_theta outer(x*(theta), theta)`.

    `x*(theta)` is defined by `inner`: a scalar function to be minimised, or one of the
    conditions `Minimum`, `LeastSquares`, `Root`, `FixedPoint`.

    **Arguments:**

    - `inner`: `(x, theta)` or, with `inner_data`, `(x, theta, data)` to a scalar; or a
        condition.
    - `outer`: `(x, theta)` or, with `outer_data`, `(x, theta, data)` to a scalar or to
        `(scalar, aux)`.
    - `inner_data`, `outer_data`: any pytree. Arrays in it are arguments of the compiled
        program, not constants: new data of the same shape compile nothing.

    `x`, `theta` and the data may be any pytree; `None` and non-array leaves pass through
    untouched. In `x` and `theta`, floats that stand alone or in dicts, lists and tuples are
    variables; plain Python numbers inside a registered class (an Equinox module, a dataclass
    that JAX knows) are settings and stay, as the rate of `eqx.nn.Dropout(0.25)`: write
    `jnp.asarray(2.0)` for a field that is to be a variable.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: 0.5 * (x - theta) ** 2 + 0.5 * x**2,
            outer=lambda x, theta: (x - 1.0) ** 2,
        )
        solution = bx.solve(problem, x0=jnp.array(0.0), theta0=jnp.array(0.0), num_steps=50)
        ```
    """

    inner: AbstractCondition
    outer: Callable
    outer_data: PyTree

    def __init__(
        self,
        inner: Callable | AbstractCondition,
        outer: Callable,
        inner_data: PyTree = None,
        outer_data: PyTree = None,
    ) -> None:
        if not isinstance(inner, AbstractCondition):
            if not callable(inner):
                raise TypeError(
                    "`inner` must be a function (x, theta) -> scalar or a condition such as "
                    f"bx.Root(fn); got {inner!r} of type {type(inner).__name__}."
                )
            inner = Minimum(inner)
        if inner_data is not None:
            if inner.data is not None:
                raise ValueError(
                    "The inner data were given twice: to the condition and as `inner_data`. "
                    "Give them once."
                )
            inner = dataclasses.replace(inner, data=inner_data)
        if inner.data is not None:
            name = "data" if inner_data is None else "inner_data"
            inner = dataclasses.replace(inner, data=_data_as_arrays(inner.data, name))
        if not callable(outer):
            raise TypeError(
                "`outer` must be a function (x, theta) -> scalar; got "
                f"{outer!r} of type {type(outer).__name__}."
            )
        _check_arguments(inner.fn, "inner", inner.data is not None)
        _check_arguments(outer, "outer", outer_data is not None)
        self.inner = inner
        self.outer = outer
        self.outer_data = _data_as_arrays(outer_data, "outer_data")

    @property
    def inner_data(self) -> PyTree:
        """The data of the inner level."""
        return self.inner.data

    def outer_value(self, x: PyTree, theta: PyTree) -> tuple[Scalar, PyTree]:
        """`(value, aux)` of the outer objective; `aux` is `None` if there is none."""
        out = call(self.outer, "outer", self.inner.primal(x), theta, self.outer_data)
        return out if isinstance(out, tuple) else (out, None)


def _data_as_arrays(data: PyTree, name: str) -> PyTree:
    """Floats and NumPy arrays in the data as JAX arrays.

    Compiled in as constants, each new value would recompile. Integers stay as they are:
    they may be sizes.
    """
    check_no_frames(data, name)
    return jtu.tree_map(
        lambda a: copied(a) if isinstance(a, float | np.ndarray | np.generic) else a,
        data,
    )


def check_no_frames(tree: PyTree, name: str) -> None:
    """Tables and tensors of other libraries cannot be traced."""
    for path, leaf in jtu.tree_leaves_with_path(tree):
        for method in ("to_numpy", "numpy"):
            if callable(getattr(leaf, method, None)) and not isinstance(leaf, type):
                where = f"{name}{jtu.keystr(path)}"
                raise TypeError(
                    f"`{where}` is a {type(leaf).__name__}, which JAX cannot trace. Give "
                    f"`{where}.{method}()`, or a dict of such arrays."
                )


def copied(number: Any) -> Array:
    """A JAX array that does not share the memory of a NumPy array, which may be changed later."""
    return jnp.asarray(np.array(number) if isinstance(number, np.ndarray) else number)


def _check_arguments(fn: Callable, name: str, has_data: bool) -> None:
    """Raise if `fn` cannot be called with `(x, theta)` or `(x, theta, data)`."""
    wanted = ("x", "theta", "data") if has_data else ("x", "theta")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # builtins have none: let the call itself complain
        return
    try:
        signature.bind(*wanted)
    except TypeError:
        remedy = (
            f"`{name}_data` was given, so it is called with the data as third argument"
            if has_data
            else f"no `{name}_data` was given, so it is called without data"
        )
        raise TypeError(
            f"`{name}` must accept ({', '.join(wanted)}); got a function with signature "
            f"{signature}: {remedy}."
        ) from None
