"""The bilevel problem, and the conditions that define `x*(theta)`."""

import abc
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from ._as_written import OneLine
from ._calls import describe, naming
from ._one_mode import OneMode, mode_of
from ._tree import strong, tree_dtype, tree_sub


class AbstractCondition(OneLine, eqx.Module):
    """What makes `x` the inner solution: the map `residual` whose zero is `x*(theta)`.

    Law: at the inner solution `residual(x, theta)` is zero. Implicit differentiation uses
    nothing else of the inner problem.
    """

    fn: eqx.AbstractVar[Callable]
    data: eqx.AbstractVar[PyTree]
    is_symmetric: eqx.AbstractClassVar[bool]  # of the derivative of the residual in x

    @abc.abstractmethod
    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        """The map whose zero is `x*(theta)`, in the structure of `x`."""

    # What else there is to the condition. Rules and solvers ask for it and not for the class:
    # one that has none of these is an equation, `residual(x, theta) = 0`.

    @property
    def objective(self) -> Callable[[PyTree, PyTree], Scalar] | None:
        """`(x, theta) -> scalar`, which the inner solution minimises."""
        return None

    @property
    def residuals(self) -> Callable[[PyTree, PyTree], PyTree[Array]] | None:
        """`(x, theta) -> pytree`, of whose squares the objective is half the sum."""
        return None

    @property
    def iteration(self) -> Callable[[PyTree, PyTree], PyTree[Array]] | None:
        """`(x, theta) -> x`, of which the inner solution is a fixed point."""
        return None

    def check_output(self, out: Any, x: PyTree) -> None:
        """Raise unless `out`, what `fn` returns as shapes, is what the condition takes."""

    def __call__(self, x: PyTree, theta: PyTree) -> Any:
        """The user's function, with its data if the level has any."""
        return _call(self.fn, "inner", x, theta, self.data)


class Minimum(AbstractCondition):
    """`x*(theta)` minimises `fn(x, theta)` or, with data, `fn(x, theta, data)`.

    The residual is `grad_x fn`; its derivative in `x`, the Hessian, is symmetric. A plain
    function given to `Bilevel` is promoted to this. Where `fn` returns `(value, aux)`, say
    `has_aux=True`; the auxiliary output of an inner function is not used.

    `strong_convexity`, if you know one, is a number or a function of theta, `mu` with
    `d2_xx fn >= mu` everywhere: the strength of a quadratic regulariser of a convex loss,
    say `lambda theta: jnp.min(jnp.exp(theta))`. With it every `Estimate` of `Implicit` has
    an `error_bound`. It is believed, not checked.
    """

    fn: Callable
    data: PyTree = None
    strong_convexity: float | Callable[[PyTree], Scalar] | None = None
    has_aux: bool = eqx.field(default=False, static=True)
    is_symmetric: ClassVar[bool] = True

    def __check_init__(self) -> None:
        _check_modulus(self.strong_convexity)

    def __call__(self, x: PyTree, theta: PyTree) -> Scalar:
        out = super().__call__(x, theta)
        return out[0] if self.has_aux else out

    @property
    def objective(self) -> Callable[[PyTree, PyTree], Scalar]:
        return self.__call__

    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return jax.grad(self.__call__)(x, theta)

    def check_output(self, out: Any, x: PyTree) -> None:
        del x
        _check_scalar(out, "inner")


class LeastSquares(AbstractCondition):
    """`x*(theta)` minimises `1/2 ||fn(x, theta)||^2`, `fn` returning a pytree of arrays.

    As `Minimum` of that objective, `strong_convexity` included; least-squares solvers
    (Gauss-Newton, Levenberg-Marquardt, ...) use the residuals `fn` themselves. A tuple is
    residuals, too: where `fn` returns `(residuals, aux)`, say `has_aux=True`.
    """

    fn: Callable
    data: PyTree = None
    strong_convexity: float | Callable[[PyTree], Scalar] | None = None
    has_aux: bool = eqx.field(default=False, static=True)
    is_symmetric: ClassVar[bool] = True

    def __check_init__(self) -> None:
        _check_modulus(self.strong_convexity)

    def __call__(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        out = super().__call__(x, theta)
        return out[0] if self.has_aux else out

    @property
    def residuals(self) -> Callable[[PyTree, PyTree], PyTree[Array]]:
        return self.__call__

    @property
    def objective(self) -> Callable[[PyTree, PyTree], Scalar]:
        return self._half_the_squares

    def _half_the_squares(self, x: PyTree, theta: PyTree) -> Scalar:
        squares = [jnp.sum(r**2) for r in jtu.tree_leaves(self(x, theta))]
        return 0.5 * sum(squares[1:], squares[0])

    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return jax.grad(self._half_the_squares)(x, theta)


class Root(AbstractCondition):
    """`x*(theta)` solves `fn(x, theta) = 0`, `fn` returning the structure of `x`.

    With `has_aux=True` `fn` returns `(value, aux)`, of which `aux` is not used.
    """

    fn: Callable
    data: PyTree = None
    has_aux: bool = eqx.field(default=False, static=True)
    is_symmetric: ClassVar[bool] = False

    def __call__(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        out = super().__call__(x, theta)
        return _like(out[0] if self.has_aux else out, x)

    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return self(x, theta)

    def check_output(self, out: Any, x: PyTree) -> None:
        _check_structure(out, x, "Root")


class FixedPoint(AbstractCondition):
    """`x*(theta)` solves `x = fn(x, theta)`. The residual is `x - fn(x, theta)`.

    With `has_aux=True` `fn` returns `(value, aux)`, of which `aux` is not used.
    """

    fn: Callable
    data: PyTree = None
    has_aux: bool = eqx.field(default=False, static=True)
    is_symmetric: ClassVar[bool] = False

    def __call__(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        out = super().__call__(x, theta)
        return _like(out[0] if self.has_aux else out, x)

    @property
    def iteration(self) -> Callable[[PyTree, PyTree], PyTree[Array]]:
        return self.__call__

    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return tree_sub(x, self(x, theta))

    def check_output(self, out: Any, x: PyTree) -> None:
        _check_structure(out, x, "FixedPoint")


def _like(out: Any, x: PyTree) -> Any:
    """What an equation returned, in the dtype of `x`."""
    if jtu.tree_structure(out) != jtu.tree_structure(x):
        return out  # the check at the door says what is wrong with it
    return jtu.tree_map(lambda a, b: jnp.asarray(a, b.dtype), out, x)


def _check_modulus(modulus: Any) -> None:
    is_number = isinstance(modulus, int | float) and not isinstance(modulus, bool)
    if is_number and not modulus > 0:
        raise ValueError(f"`strong_convexity` must be positive; got {modulus}.")
    if not (modulus is None or is_number or callable(modulus) or eqx.is_array(modulus)):
        raise TypeError(
            "`strong_convexity` must be a positive number or a function of theta; got "
            f"{type(modulus).__name__}."
        )


def strong_convexity(condition: AbstractCondition, theta: PyTree) -> Scalar | None:
    """The modulus that the user has stated, at theta; `None` if none was."""
    modulus = getattr(condition, "strong_convexity", None)
    if not callable(modulus):
        return None if modulus is None else jnp.asarray(modulus, tree_dtype(theta))
    bound = _bound(condition)
    if bound is not None:
        theta = eqx.combine(theta, bound.theta_static)
    value: Any = modulus(theta)
    _check_scalar(jax.eval_shape(lambda: value), "strong_convexity")
    return value


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
        out = _call(self.outer, "outer", x, theta, self.outer_data)
        return out if isinstance(out, tuple) else (out, None)


def _data_as_arrays(data: PyTree, name: str) -> PyTree:
    """Floats and NumPy arrays in the data as JAX arrays.

    Compiled in as constants, each new value would recompile. Integers stay as they are:
    they may be sizes.
    """
    _check_no_frames(data, name)
    return jtu.tree_map(
        lambda a: _copied(a) if isinstance(a, float | np.ndarray | np.generic) else a,
        data,
    )


def _check_no_frames(tree: PyTree, name: str) -> None:
    """Tables and tensors of other libraries cannot be traced."""
    for path, leaf in jtu.tree_leaves_with_path(tree):
        for method in ("to_numpy", "numpy"):
            if callable(getattr(leaf, method, None)) and not isinstance(leaf, type):
                where = f"{name}{jtu.keystr(path)}"
                raise TypeError(
                    f"`{where}` is a {type(leaf).__name__}, which JAX cannot trace. Give "
                    f"`{where}.{method}()`, or a dict of such arrays."
                )


def _copied(number: Any) -> Array:
    """A JAX array that does not share the memory of a NumPy array, which may be changed later."""
    return jnp.asarray(np.array(number) if isinstance(number, np.ndarray) else number)


def _call(fn: Callable, name: str, x: PyTree, theta: PyTree, data: PyTree) -> Any:
    if data is None:
        with naming(name, x=x, theta=theta):
            return fn(x, theta)
    with naming(name, x=x, theta=theta, data=data):
        return fn(x, theta, data)


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


def as_arrays(tree: PyTree) -> PyTree:
    """`tree` with its Python and NumPy numbers as strong-typed JAX arrays.

    Not so the plain numbers inside a registered class (an Equinox module, a dataclass):
    those are settings, such as the rate of a dropout, and stay what they are.
    """
    parts, structure = jtu.tree_flatten(tree, is_leaf=_is_of_class)
    return strong(jtu.tree_unflatten(structure, [_part_as_arrays(part) for part in parts]))


def _part_as_arrays(part: Any) -> Any:
    if _is_of_class(part):
        return jtu.tree_map(lambda a: _copied(a) if _is_array(a) else a, part)
    return _copied(part) if _is_numeric(part) else part


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
        bound = eqx.tree_at(
            lambda p: (p.inner.fn, p.outer),
            problem,
            (
                _Bound(problem.inner.fn, x_static, theta_static),
                _Bound(problem.outer, x_static, theta_static),
            ),
        )
    if is_start_function(x0):
        x_arrays = _BoundStart(x0, theta_static)
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
    return eqx.combine(x, bound.x_static), eqx.combine(theta, bound.theta_static)


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
        return self.fn(eqx.combine(x, self.x_static), eqx.combine(theta, self.theta_static), *data)


class _BoundStart(eqx.Module):
    """`x0(theta)`, from and to pytrees of floating-point arrays."""

    fn: Callable
    theta_static: PyTree

    def __call__(self, theta: PyTree) -> PyTree:
        x0 = as_arrays(start_at(self.fn, eqx.combine(theta, self.theta_static)))
        return _split(x0, "x0(theta)")[0]


def _is_numeric(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) and not isinstance(leaf, bool)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _split(tree: PyTree, name: str) -> tuple[PyTree, PyTree]:
    """Floating-point arrays and the rest; integers and complex numbers are refused."""
    _check_no_frames(tree, name)
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
    _check_scalar(value, "outer")
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


def _check_scalar(out: Any, name: str) -> None:
    ok = isinstance(out, jax.ShapeDtypeStruct) and out.shape == ()
    if not (ok and jnp.issubdtype(out.dtype, jnp.floating)):
        extra = " or (scalar, aux)" if name == "outer" else ""
        hint = (
            " For an equation or a fixed point use bx.Root(fn) or bx.FixedPoint(fn); for a "
            "function that returns (value, aux) bx.Minimum(fn, has_aux=True)."
            if name == "inner"
            else ""
        )
        raise TypeError(
            f"`{name}` must return a floating-point scalar{extra}; got {describe(out)}.{hint}"
        )


def _check_structure(out: Any, x: PyTree, name: str) -> None:
    if jtu.tree_structure(out) != jtu.tree_structure(x) or any(
        a.shape != b.shape for a, b in zip(jtu.tree_leaves(out), jtu.tree_leaves(x), strict=True)
    ):
        raise TypeError(
            f"The function of `{name}` must return a pytree of the structure and shapes of "
            f"x, {describe(x)}; got {describe(out)}."
        )
