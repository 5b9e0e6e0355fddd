"""What `x*(theta)` is: the conditions."""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._as_written import OneLine
from .._calls import describe, naming
from .._linear import default_linear_solver
from .._results import RESULTS
from .._tree import stop_gradient, tree_size, tree_sub
from ._linearised import Linearised, of_equation, of_gradient


class AbstractCondition(OneLine, eqx.Module):
    """What makes `x` the inner solution: the map `residual` whose zero is `x*(theta)`.

    Law: at the inner solution `residual(x, theta)` is zero. Implicit differentiation uses
    nothing else of the inner problem.
    """

    fn: eqx.AbstractVar[Callable]
    if TYPE_CHECKING:
        # Type checkers take an abstract variable for an argument, which would be the second.
        @property
        def data(self) -> PyTree: ...
    else:
        data: eqx.AbstractVar[PyTree]
    # Of the derivative in x of what is linearised. A `ClassVar` or a property of each condition.
    is_symmetric: ClassVar[bool] = False

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

    @property
    def kind(self) -> str:
        """What is solved, in the words of Optimistix."""
        if self.iteration is not None:
            return "fixed_point"
        return "root_find" if self.objective is None else "minimise"

    @property
    def has_inequalities(self) -> bool:
        """Whether the unknown has multipliers of inequalities, see `ConstrainedMinimum`."""
        return False

    @property
    def nonsmooth(self) -> Any:
        """The term beside a smooth objective that has a proximal step, see `ProximalMinimum`."""
        return None

    def equation_at(self, x: PyTree, theta: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
        """The smooth map, zero at `x*`, whose derivatives at `(x, theta)` say how `x*` moves.

        `residual` itself, unless that has kinks: then the map on this side of them, say on
        the support of x. The adjoint system is that of this map, and `is_symmetric` is said
        of it.
        """
        del x, theta
        return self.residual

    def residual_here(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        """The value of `equation_at` where it is taken, with its derivatives."""
        return self.equation_at(*stop_gradient((x, theta)))(x, theta)

    def linearise(self, x: PyTree, theta: PyTree) -> Linearised:
        """`equation_at` with the products of its derivatives."""
        is_smooth = type(self).equation_at is AbstractCondition.equation_at
        if is_smooth and self.objective is not None:
            return of_gradient(self.objective, x, theta)
        return of_equation(self.equation_at(x, theta), x, theta)

    def verdict(self, x: PyTree, theta: PyTree, residual: Scalar, tolerance: Scalar) -> RESULTS:
        """What else stands against the derivative of `x*` at an x of this residual."""
        del x, theta, residual, tolerance
        return RESULTS.successful

    def default_solver(self, x0: PyTree) -> Any:
        """The inner solver, where the user names none; `None` is the library's own choice."""
        del x0
        return None

    def default_linear_solver(self, x: PyTree) -> lx.AbstractLinearSolver:
        """Of the adjoint system, where the user names none."""
        return default_linear_solver(self.is_symmetric, tree_size(x))

    # More unknowns than the user's x: multipliers, say. All of the library sees the unknown.

    def unknown(self, x0: PyTree, theta: PyTree) -> PyTree:
        """Where the search for the unknown begins: from the user's `x0`, or an unknown again."""
        del theta
        return x0

    def primal(self, unknown: PyTree) -> PyTree:
        """The user's x in it: what the outer objective sees, and what `argmin` returns."""
        return unknown

    def refined(self, unknown: PyTree, theta: PyTree) -> PyTree:
        """An unknown from elsewhere, made more exact where the condition knows how."""
        del theta
        return unknown

    def magnitude(self, unknown: PyTree) -> PyTree:
        """The sizes with which errors of the unknown are compared: its own, entry by entry."""
        return unknown

    def map_functions(self, wrap: Callable[[Callable], Callable]) -> "AbstractCondition":
        """The condition with other functions: `wrap` of each that is called like `fn`."""
        return eqx.tree_at(lambda c: c.fn, self, wrap(self.fn))

    def check_output(self, out: Any, x: PyTree) -> None:
        """Raise unless `out`, what `fn` returns as shapes, is what the condition takes."""

    def __call__(self, x: PyTree, theta: PyTree) -> Any:
        """The user's function, with its data if the level has any, without what it adds as aux."""
        out = call(self.fn, "inner", self.primal(x), theta, self.data)
        return out[0] if getattr(self, "has_aux", False) else out


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

    @property
    def objective(self) -> Callable[[PyTree, PyTree], Scalar]:
        return self.__call__

    def residual(self, x: PyTree, theta: PyTree) -> PyTree[Array]:
        return jax.grad(self.__call__)(x, theta)

    def check_output(self, out: Any, x: PyTree) -> None:
        del x
        check_scalar(out, "inner")


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
        return _like(super().__call__(x, theta), x)

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
        return _like(super().__call__(x, theta), x)

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


def call(fn: Callable, name: str, x: PyTree, theta: PyTree, data: PyTree) -> Any:
    if data is None:
        with naming(name, x=x, theta=theta):
            return fn(x, theta)
    with naming(name, x=x, theta=theta, data=data):
        return fn(x, theta, data)


def check_scalar(out: Any, name: str) -> None:
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
