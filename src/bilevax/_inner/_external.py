"""Solutions from elsewhere: a black box on the host, a traceable function, a given x."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree, Scalar

from .._calls import naming
from .._problem import AbstractCondition, restore
from .._reach._tokens import OnHost
from .._tree import is_traced, tree_dtype, unbounded
from ._base import AbstractInnerSolver, Counts, InnerSolution, measure


class Given(AbstractInnerSolver):
    """The `x0` that is given is the solution already; it is only checked.

    **Arguments:**

    - `rtol`, `atol`: what its residual must meet; see `measure`.

    **Cost:** one gradient and one Hessian product.
    """

    solves_anywhere: ClassVar[bool] = False

    rtol: float | None = None
    atol: float | Scalar | None = None

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> None:
        del condition, x0, theta

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: None
    ) -> tuple[InnerSolution, None]:
        x = condition.refined(x0, theta)
        return measure(condition, x, x0, theta, self.rtol, self.atol, 0, Counts()), None


def wherever(x: PyTree) -> Given:
    """What takes an `x` as it is, whatever its residual."""
    return Given(atol=unbounded(jnp.zeros((), tree_dtype(x))))


class Traceable(AbstractInnerSolver):
    """Your own solver, written in JAX: `fn(x0, theta) -> x`, or `fn(x0, theta, data)`.

    **Arguments:**

    - `fn`: a function that JAX can trace. It need not be differentiable.
    - `rtol`, `atol`: what the residual of its answer must meet; see `measure`.

    **Cost:** what `fn` takes, which is not counted, and one gradient and one Hessian
    product for the check.
    """

    fn: Callable
    rtol: float | None = None
    atol: float | None = None

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> None:
        del condition, x0, theta

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: None
    ) -> tuple[InnerSolution, None]:
        x = _named_call(self.fn, _arguments(condition, x0, theta))
        x = eqx.filter(x, eqx.is_inexact_array)
        x = condition.refined(_as_structure(x, x0), theta)
        return measure(condition, x, x0, theta, self.rtol, self.atol, 1, Counts()), None


class External(AbstractInnerSolver):
    """A black box on the host: SciPy, scikit-learn, a simulator.

    `fn(x0, theta) -> x` or, where the inner level has data, `fn(x0, theta, data) -> x`;
    NumPy arrays in, NumPy arrays (or anything NumPy can convert) out, in the structure of
    `x0`. Implicit rules need nothing else of it: its answer is checked by the residual.

    In `bx.hypergradient` and `bx.solve` the function runs between the compiled parts, so
    it may itself call JAX. Under somebody else's `jax.jit`, and in `bx.argmin`, it runs
    in a `jax.pure_callback`: there it must not call JAX, which can deadlock.

    A box that stops where its objective no longer falls, whatever `tol` it is given (L-BFGS
    in SciPy and scikit-learn), leaves a residual of 1e-7 to 1e-5 in float64. Take Newton's
    method (`solver="newton-cholesky"`), or say that this is enough: `rtol=1e-5`.

    **Arguments:**

    - `fn`: the black box.
    - `rtol`, `atol`: what the residual of its answer must meet; see `measure`.

    **Cost:** what `fn` takes, which is not counted, and one gradient and one Hessian
    product for the check.

    !!! example

        ```python
        import bilevax as bx, numpy as np

        def ridge(x0, theta, data):  # NumPy in, NumPy out
            features, targets = data
            gram = features.T @ features + np.diag(np.exp(theta))
            return np.linalg.solve(gram, features.T @ targets)

        inner_solver = bx.External(ridge)
        ```
    """

    solves_anywhere: ClassVar[bool] = False
    needs_host: ClassVar[bool] = True

    fn: Callable = eqx.field(converter=OnHost)
    rtol: float | None = None
    atol: float | None = None

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> None:
        del condition, x0, theta

    def on_host(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        """`fn` on concrete arrays."""
        to_numpy = jtu.tree_map(
            lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf,
            _arguments(condition, x0, theta),
        )
        return _as_structure(_named_call(self.fn, to_numpy), x0)

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: None
    ) -> tuple[InnerSolution, None]:
        arrays, static = eqx.partition((condition, x0, theta), eqx.is_array)

        def host(arrays: PyTree) -> PyTree:
            return self.on_host(*eqx.combine(arrays, static))

        x = jax.pure_callback(host, jax.eval_shape(lambda: x0), arrays, vmap_method="sequential")
        x = condition.refined(x, theta)
        return measure(condition, x, x0, theta, self.rtol, self.atol, 1, Counts()), None

    def before(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree
    ) -> tuple[Given, PyTree]:
        answer = self.on_host(condition, x0, theta)
        return self.in_program, jtu.tree_map(jnp.asarray, answer)

    @property
    def in_program(self) -> Given:
        """The check that remains once the black box has run."""
        return Given(self.rtol, self.atol)


def _arguments(condition: AbstractCondition, x0: PyTree, theta: PyTree) -> tuple[Any, ...]:
    """What the user's function is called with: everything in the user's own structure."""
    x0, theta = restore(condition, x0, theta)
    return (x0, theta) if condition.data is None else (x0, theta, condition.data)


def _named_call(fn: Callable, arguments: tuple[Any, ...]) -> PyTree:
    with naming("inner_solver", **dict(zip(("x0", "theta", "data"), arguments, strict=False))):
        return fn(*arguments)


def _as_structure(x: PyTree, x0: PyTree) -> PyTree:
    """`x` in the structure, shapes and dtypes of `x0`, or a clear error."""
    leaves, wanted = (
        [leaf for leaf in jtu.tree_leaves(x) if not isinstance(leaf, str)],
        (jtu.tree_leaves(x0)),
    )
    xp = jnp if is_traced(leaves) else np
    shapes = [np.shape(leaf) for leaf in leaves]
    if shapes != [leaf.shape for leaf in wanted]:
        raise ValueError(
            "The inner solver's function must return x in the structure and shapes of x0, "
            f"{[leaf.shape for leaf in wanted]}; got {shapes}."
        )
    leaves = [xp.asarray(a, dtype=b.dtype) for a, b in zip(leaves, wanted, strict=True)]
    return jtu.tree_unflatten(jtu.tree_structure(x0), leaves)
