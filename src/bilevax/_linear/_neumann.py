"""The Neumann series, cut after a fixed number of terms."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._checks import check_count, check_step_size
from .._results import RESULTS
from .._tree import tree_all_finite, tree_axpy, tree_norm, tree_scale
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import find_step_size, scaled_start

# Growth of the terms that is no accident of rounding or of a matrix that is not normal.
_GROWTH = 10.0


class Neumann(AbstractIterativeLinearSolver):
    """Neumann series `v = step_size sum_{j < K} (I - step_size A)^j b`, `K = num_terms`.

    Exactly K terms, which are K steps of gradient descent from zero and take K - 1
    products. (Where others say "K Neumann iterations" they often mean K + 1 terms.) The
    residual is reported, not flagged; before it is measured by `verify` it is that of
    K - 1 terms, `||(I - step_size A)^(K - 1) b|| / ||b||`.

    **Arguments:**

    - `num_terms`: K.
    - `step_size`: by default `1 / (1.05 m)`, `m` the largest eigenvalue by ten steps of
        the power method. For a system that is known not to be symmetric (`Root`,
        `FixedPoint`) by default 1: with `A = I - T'` this is the series of the powers of
        `T'`, which converges where the fixed-point iteration does.

    **Returns** (from `solve`): a `LinearSolution`. Outcomes: `diverged` (the terms grow,
    so the largest eigenvalue of `I - step_size A` exceeds one), `nonfinite`. A guess or a
    preconditioner is not used.

    **Cost:** K - 1 products, ten for the step size; two vectors.

    **Exact when** `K` goes to infinity and the eigenvalues of `I - step_size A` are inside
    the unit circle; the error is `-(I - step_size A)^K` times the solution. At an exact
    inner solution equal to the derivative of the last K steps of gradient descent.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[3.0, 1.0], [1.0, 2.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.Neumann(num_terms=20).solve(lambda v: A @ v, b)
        ```

    Reference: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by
    implicit differentiation" (2020), equation (8).
    """

    num_terms: int
    step_size: float | Scalar | None = None

    def __check_init__(self) -> None:
        check_count("Neumann", required=True, num_terms=self.num_terms)
        check_step_size("Neumann", self.step_size)

    def for_nonsymmetric(self) -> "Neumann":
        # As for `GradientDescent`.
        return self if self.step_size is not None else dataclasses.replace(self, step_size=1.0)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        del v0, preconditioner
        scale, b, *_ = scaled_start(matvec, b, None)
        norm_b = tree_norm(b)
        step_size, step_products = find_step_size(self.step_size, matvec, b)

        def is_running(carry: _Carry) -> Bool[Array, ""]:
            _, _, norm, smallest, num_terms = carry
            is_good = jnp.isfinite(norm) & (norm <= _GROWTH * smallest)
            return is_good & (num_terms < self.num_terms)

        def step(carry: _Carry) -> _Carry:
            total, term, _, smallest, num_terms = carry
            term = tree_axpy(-step_size, matvec(term), term)
            norm = tree_norm(term)
            # A term that is not finite is not added: the value is the last finite sum.
            is_finite = jnp.isfinite(norm)
            total = jtu.tree_map(lambda s, t: jnp.where(is_finite, s + t, s), total, term)
            return total, term, norm, jnp.minimum(smallest, norm), num_terms + 1

        start = (b, b, norm_b, norm_b, jnp.ones((), jnp.int32))
        total, _, norm, smallest, num_terms = jax.lax.while_loop(is_running, step, start)
        value = tree_scale(step_size * scale, total)
        has_grown = (norm > _GROWTH * smallest) | (norm > 1.1 * norm_b)
        result = RESULTS.where(has_grown, RESULTS.diverged, RESULTS.successful)
        is_finite = jnp.isfinite(norm) & tree_all_finite(value)
        result = RESULTS.where(is_finite, result, RESULTS.nonfinite)
        return LinearSolution(
            value=value,
            residual=norm / jnp.where(norm_b > 0, norm_b, 1),
            tolerance=None,
            num_steps=num_terms,
            num_products=num_terms - 1 + step_products,
            result=result,
        )


_Carry = tuple[PyTree, PyTree, Scalar, Scalar, Array]
