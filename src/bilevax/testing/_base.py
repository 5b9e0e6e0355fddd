"""The record of a problem whose answers are known, and the NumPy that computes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._problem import AbstractCondition, Bilevel, FixedPoint, LeastSquares, Minimum, Root

_KINDS: dict[type[AbstractCondition], str] = {
    Minimum: "minimum",
    LeastSquares: "least_squares",
    Root: "root",
    FixedPoint: "fixed_point",
}


class Reference(NamedTuple):
    """The answers at one theta: NumPy, float64, no JAX and no solver of this library."""

    x_star: PyTree
    v_star: PyTree  # solves A^T v = d_x L, A the derivative of the residual in x
    value: np.ndarray  # L(x*, theta)
    hypergradient: PyTree
    jacobian: np.ndarray | None = None  # D x*, where x and theta are single arrays
    hyper_hessian: np.ndarray | None = None  # second derivative of the value, where known


class Oracle(eqx.Module):
    """A bilevel problem with exact answers.

    `problem`, `x0` and `theta` are in the dtype asked for; the answers are NumPy arrays in
    float64, computed from the data as rounded to that dtype, so that a float32 problem is
    not blamed for the rounding of its data. `reference(theta)` gives the answers at any
    other theta, `theta_star` is an exact minimiser of the outer problem or `None`. Where x
    or theta has strings, v and the hypergradient have `None`.

    !!! example

        ```python
        import bilevax.testing as bt, jax.numpy as jnp

        oracle = bt.ridge()
        value, _ = oracle.problem.outer_value(jnp.asarray(oracle.x_star), oracle.theta)
        assert bt.relative_error(value, oracle.value) < 1e-4
        ```
    """

    name: str
    problem: Bilevel
    x0: PyTree
    theta: PyTree
    reference: Callable[[PyTree], Reference]
    x_star: PyTree
    v_star: PyTree
    value: np.ndarray
    hypergradient: PyTree
    jacobian: np.ndarray | None
    hyper_hessian: np.ndarray | None
    theta_star: PyTree
    is_strongly_convex: bool  # a minimum with a positive definite Hessian at x*

    def __init__(
        self,
        name: str,
        problem: Bilevel,
        x0: PyTree,
        theta: PyTree,
        reference: Callable[[PyTree], Reference],
        theta_star: PyTree = None,
        is_strongly_convex: bool = True,
    ) -> None:
        self.name = name
        self.problem = problem
        self.x0 = x0
        self.theta = theta
        self.reference = reference
        answers = reference(theta)
        self.x_star, self.v_star = answers.x_star, answers.v_star
        self.value, self.hypergradient = answers.value, answers.hypergradient
        self.jacobian, self.hyper_hessian = answers.jacobian, answers.hyper_hessian
        self.theta_star = theta_star
        self.is_strongly_convex = is_strongly_convex

    @property
    def kind(self) -> str:
        """`"minimum"`, `"least_squares"`, `"root"` or `"fixed_point"`."""
        return _KINDS[type(self.problem.inner)]

    @property
    def size(self) -> int:
        """Number of entries of x."""
        return sum(leaf.size for leaf in jtu.tree_leaves(numbers(self.x0)))


def implicit_reference(
    x: np.ndarray,
    value: Any,
    residual_x: np.ndarray,
    residual_theta: np.ndarray,
    outer_x: np.ndarray,
    outer_theta: np.ndarray | float,
    hyper_hessian: np.ndarray | None = None,
) -> Reference:
    """The answers at `x = x*` from the dense derivatives `A`, `B` of the residual.

    `A^T v = d_x L`, `D x* = -A^{-1} B`, hypergradient `d_theta L - B^T v`.
    """
    v = np.linalg.solve(residual_x.T, outer_x)
    return Reference(
        x_star=x,
        v_star=v,
        value=np.asarray(value),
        hypergradient=np.asarray(outer_theta - residual_theta.T @ v),
        jacobian=-np.linalg.solve(residual_x, residual_theta),
        hyper_hessian=hyper_hessian,
    )


def newton(
    residual_and_derivative: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
) -> np.ndarray:
    """The root to rounding error, by Newton's method from `x`."""
    for _ in range(50):  # ten suffice on our problems
        residual, derivative = residual_and_derivative(x)
        step = np.linalg.solve(derivative, residual)
        x = x - step
        # The error is now of the order of the step's square: below rounding. A smaller
        # bound is not always reached, because the residual itself is rounded.
        if np.linalg.norm(step) <= 1e-9 * np.linalg.norm(x):
            return x
    raise RuntimeError("Newton's method did not converge: no reference at this theta.")


def cosine_matrix(num_rows: int, num_columns: int, frequency: float, phase: float) -> np.ndarray:
    """`cos(frequency (i+1) (j+1) + phase i)`, i and j from 0: data without a random key.

    Columns whose frequencies nearly coincide modulo 2 pi are nearly parallel, as j and
    j + 17 are at 0.37.
    """
    i, j = np.arange(num_rows)[:, None], np.arange(num_columns)[None, :]
    return np.cos(frequency * (i + 1) * (j + 1) + phase * i)


def tone_matrix(num_rows: int, num_columns: int, frequency: float, phase: float) -> np.ndarray:
    """`cos(frequency (i+1) sqrt(j+1) + phase j)`, i and j from 0."""
    i, j = np.arange(num_rows)[:, None], np.arange(num_columns)[None, :]
    return np.cos(frequency * (i + 1) * np.sqrt(j + 1) + phase * j)


def is_numeric(leaf: Any) -> bool:
    """Whether a leaf takes part in the arithmetic: not `None`, not a string."""
    return isinstance(leaf, float | np.ndarray | np.generic | jax.Array)


def numbers(tree: PyTree) -> PyTree:
    """The numeric leaves of a pytree as NumPy arrays in float64; `None` for the others."""
    return jtu.tree_map(
        lambda leaf: np.asarray(leaf, np.float64) if is_numeric(leaf) else None, tree
    )


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The numeric leaves as JAX arrays of `dtype`; `float` is JAX' default precision."""
    wanted = jnp.zeros(()).dtype if dtype is float else jnp.dtype(dtype)
    if not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"`dtype` must be a floating-point dtype; got {wanted}.")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"`dtype` {wanted} is not enabled in JAX. Call "
            "jax.config.update('jax_enable_x64', True), or ask for float32."
        )
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf, wanted) if is_numeric(leaf) else leaf, tree)


def relative_error(a: PyTree, b: PyTree) -> float:
    """`||a - b|| / ||b||` in the two-norm over all numeric leaves, computed in float64.

    `||a||` if `b` is zero; infinite if anything is not finite, so that no comparison with
    a tolerance lets it pass. Pytrees of different structure or shapes are an error:
    nothing is broadcast. Leaves that are not numeric are not compared.
    """
    a, b = numbers(a), numbers(b)
    leaves_a, leaves_b = jtu.tree_leaves(a), jtu.tree_leaves(b)
    shapes_a, shapes_b = [x.shape for x in leaves_a], [x.shape for x in leaves_b]
    if jtu.tree_structure(a) != jtu.tree_structure(b) or shapes_a != shapes_b:
        raise ValueError(
            "`relative_error` compares pytrees of one structure and the same shapes; got "
            f"{jtu.tree_structure(a)} with {shapes_a} and {jtu.tree_structure(b)} with {shapes_b}."
        )
    if not leaves_a:
        raise ValueError("`relative_error` was given pytrees without a numeric leaf.")
    flat_a = np.concatenate([x.ravel() for x in leaves_a])
    flat_b = np.concatenate([x.ravel() for x in leaves_b])
    if not np.all(np.isfinite(flat_a)) or not np.all(np.isfinite(flat_b)):
        return float("inf")
    error, norm = np.linalg.norm(flat_a - flat_b), np.linalg.norm(flat_b)
    return float(error / norm) if norm > 0 else float(error)
