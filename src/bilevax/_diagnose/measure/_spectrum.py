"""The extreme eigenvalues or singular values of the derivative of the inner residual."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..._jit import lean_jit
from ..._problem import Bilevel
from ..._tree import dense_columns, tree_dtype, tree_size, tree_sub
from ._differences import gaussian
from ._lanczos import growth_rate, largest_singular_value, ritz_values, tridiagonalise

# Up to this size the matrix is formed and everything is exact.
DENSE_SIZE = 200


class Spectrum(NamedTuple):
    """What is known of `A`: eigenvalues if it is symmetric, otherwise singular values.

    An eigenvalue lies within `uncertainty` of each end; if `is_exact`, it is the end of the
    spectrum, otherwise `smallest` may be far above it.
    """

    smallest: float
    smallest_uncertainty: float
    largest: float
    largest_uncertainty: float
    is_exact: bool
    num_singular: int  # eigenvalues below rounding, of those that were computed
    condition: float  # a lower bound unless `is_exact`
    verdict: str
    spectral_radius: float = float("nan")  # of T', for fixed points
    contraction: float = float("nan")  # ||T'||, for fixed points
    matrix: np.ndarray | None = None


def spectrum(problem: Bilevel, x: PyTree, theta: PyTree, max_lanczos_steps: int) -> Spectrum:
    """The extreme eigenvalues (singular values without symmetry) at `x`."""
    is_symmetric = problem.inner.is_symmetric
    is_fixed_point = problem.inner.iteration is not None
    rounding = float(jnp.finfo(tree_dtype(x)).eps)
    if tree_size(x) <= DENSE_SIZE:
        matrix = np.asarray(_matrix(problem, x, theta), np.float64)
        if not np.all(np.isfinite(matrix)):
            return _unknown(matrix)
        radius, norm = _of_map(np.eye(len(matrix)) - matrix) if is_fixed_point else (np.nan,) * 2
        if is_symmetric:
            values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        else:
            values = np.linalg.svd(matrix, compute_uv=False)[::-1]
        size = np.max(np.abs(values), initial=0.0)
        # The errors of the entries are independent: their matrix has about this norm.
        floor = 4 * np.sqrt(len(values)) * rounding * size
        bounds = np.full(len(values), floor)
        found = _judge(values, bounds, floor, True, is_symmetric)
        return found._replace(spectral_radius=radius, contraction=norm, matrix=matrix)
    start = gaussian(x, 0)
    alpha, beta, norm, radius = _krylov(problem, x, theta, start, max_lanczos_steps)
    if not np.all(np.isfinite(np.asarray([*alpha, *beta]))):
        return _unknown(None)
    values, bounds = ritz_values(np.asarray(alpha), np.asarray(beta), rounding)
    floor = 10 * rounding * np.max(np.abs(values))
    if not is_symmetric:
        # These are of A'A: singular values below the root of the rounding are lost.
        squares, floor = np.maximum(values, 0), np.sqrt(floor)
        values = np.sqrt(squares)
        bounds = np.sqrt(squares + bounds) - values
    found = _judge(values, bounds, floor, False, is_symmetric)
    if is_fixed_point:
        found = found._replace(spectral_radius=float(radius), contraction=float(norm))
    return found


def _judge(
    values: np.ndarray, bounds: np.ndarray, floor: float, is_exact: bool, is_symmetric: bool
) -> Spectrum:
    """The words for the eigenvalues, in ascending order; below `floor` they are rounding."""
    if len(values) == 0:
        return Spectrum(0.0, 0.0, 0.0, 0.0, True, 0, 1.0, "empty")
    # Ritz values are Rayleigh quotients, never below the smallest eigenvalue: a negative
    # one proves negative curvature, a zero one of a semidefinite matrix a singular one.
    sizes = np.abs(values)
    num_singular = int(np.sum(sizes <= floor))
    condition = float(np.max(sizes) / np.min(sizes)) if num_singular == 0 else np.inf
    seen = "" if is_exact else " as far as seen"
    verdict = ("positive definite" if is_symmetric else "invertible") + seen
    if num_singular or (is_symmetric and values[0] < 0):
        verdict = "singular"
    if is_symmetric and values[0] < -10 * floor:
        verdict = "indefinite"
        condition = condition if is_exact else np.nan  # Ritz values near zero mean nothing
    ends = (float(values[0]), float(bounds[0]), float(values[-1]), float(bounds[-1]))
    return Spectrum(*ends, is_exact, num_singular, condition, verdict)


def _of_map(matrix: np.ndarray) -> tuple[float, float]:
    """The spectral radius and the two-norm."""
    if len(matrix) == 0:
        return 0.0, 0.0
    return float(np.max(np.abs(np.linalg.eigvals(matrix)))), float(np.linalg.norm(matrix, 2))


def _unknown(matrix: np.ndarray | None) -> Spectrum:
    nan = float("nan")
    return Spectrum(nan, nan, nan, nan, False, 0, nan, "unknown", matrix=matrix)


@lean_jit
def _matrix(problem: Bilevel, x: PyTree, theta: PyTree) -> Float[Array, "d d"]:
    """`A`, column by column."""
    if tree_size(x) == 0:
        return jnp.zeros((0, 0))
    matvec = problem.inner.linearise(x, theta).forward
    return dense_columns(matvec, x).T


@lean_jit
def _krylov(
    problem: Bilevel, x: PyTree, theta: PyTree, start: PyTree, num_steps: int
) -> tuple[Array | None, ...]:
    """Lanczos of `A`, or of `A'A` without symmetry; norm and growth of a fixed point's map."""
    matvec = problem.inner.linearise(x, theta).forward
    if problem.inner.is_symmetric:
        return *tridiagonalise(matvec, start, num_steps), None, None
    transpose = _transpose(matvec, x)
    normal = tridiagonalise(lambda v: transpose(matvec(v)), start, num_steps)
    if problem.inner.iteration is None:
        return *normal, None, None
    # T' = I - A
    forward = lambda v: tree_sub(v, matvec(v))  # noqa: E731
    norm = largest_singular_value(forward, lambda v: tree_sub(v, transpose(v)), start)
    return *normal, norm, growth_rate(forward, start)


def _transpose(matvec: Callable[[PyTree], PyTree], x: PyTree) -> Callable[[PyTree], PyTree]:
    transposed = jax.linear_transpose(matvec, x)
    return lambda v: transposed(v)[0]
