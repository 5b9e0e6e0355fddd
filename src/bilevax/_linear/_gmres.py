"""GMRES on pytrees, for systems that are not symmetric."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._results import RESULTS
from .._tree import (
    tree_all_finite,
    tree_axpy,
    tree_norm,
    tree_scale,
    tree_size,
    tree_sub,
    tree_where,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import scaled_start, step_limit, target_norm
from ._in_turn import factorise


class GMRES(AbstractIterativeLinearSolver):
    """Generalised minimal residuals for `A v = b`, `A` square and non-singular.

    Stops within a cycle, when `||b - A v|| <= atol + rtol ||b||` in the two-norm. (Lineax'
    takes whole cycles, 64 products where 22 do, and needs an `atol` where `b` has zeros.)

    **Arguments:**

    - `rtol`, `atol`: tolerances; `rtol=None` is 1e-6 in float64 and 1e-4 below.
    - `restart`: steps in a cycle, and vectors kept.
    - `max_steps`: by default ten times the size of `b`, at most 10,000. A cycle that has
        begun is finished.

    **Returns** (from `solve`): a `LinearSolution`. A guess worse than zero is dropped.
    The preconditioner approximates the inverse of `A` and acts from the right, so that
    the residual is that of `A v = b`. Outcomes: `stalled` (a cycle without progress near
    the precision), `adjoint_not_converged` (a cycle without progress, or `max_steps`),
    `nonfinite`; then the value is the last finite iterate.

    **Cost:** one product per step, one for a guess; `restart + 4` vectors.

    **Exact when** the eigenvalues of `A` lie in a half plane, or `restart` is the size.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[3.0, 1.0], [-1.0, 2.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.GMRES(rtol=1e-5).solve(lambda v: A @ v, b)
        ```

    Reference: Saad and Schultz, "GMRES: a generalized minimal residual algorithm", SIAM
    J. Sci. Stat. Comput. 7 (1986), algorithm 4.
    """

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    restart: int = 20
    max_steps: int | None = None

    def __check_init__(self) -> None:
        check_tolerance("GMRES", rtol=self.rtol, atol=self.atol)
        check_count("GMRES", restart=self.restart, max_steps=self.max_steps)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        precondition = (lambda r: r) if preconditioner is None else preconditioner
        scale, b, v, r, num_products = scaled_start(matvec, b, v0)
        norm_b = tree_norm(b)
        target = target_norm(self.rtol, self.atol, b, norm_b, scale)
        limit = step_limit(self.max_steps, b)
        length = min(self.restart, max(tree_size(b), 1))

        def cycle(s: _State) -> _State:
            v_change, r_change, num_steps = _cycle(
                lambda u: matvec(precondition(u)), s.r, s.norm, target, length
            )
            r = tree_sub(s.r, r_change)
            norm = tree_norm(r)
            is_floor = norm < float(jnp.finfo(norm.dtype).eps) ** 0.5 * norm_b
            halt = RESULTS.where(is_floor, RESULTS.stalled, RESULTS.adjoint_not_converged)
            # In exact arithmetic a cycle cannot increase the residual.
            result = RESULTS.where(norm > 0.999 * s.norm, halt, RESULTS.successful)
            is_finite = jnp.isfinite(norm)
            result = RESULTS.where(is_finite, result, RESULTS.nonfinite)
            v = tree_where(is_finite, tree_axpy(1.0, precondition(v_change), s.v), s.v)
            return _State(v, r, jnp.where(is_finite, norm, s.norm), s.num_steps + num_steps, result)

        norm = tree_norm(r)
        result = RESULTS.where(jnp.isfinite(norm), RESULTS.successful, RESULTS.nonfinite)
        state = jax.lax.while_loop(
            lambda s: (s.result == RESULTS.successful) & (s.norm > target) & (s.num_steps < limit),
            cycle,
            _State(v, r, norm, jnp.zeros((), jnp.int32), result),
        )
        value, result = tree_scale(scale, state.v), state.result
        is_late = (result == RESULTS.successful) & (state.norm > target)
        result = RESULTS.where(is_late, RESULTS.adjoint_not_converged, result)
        result = RESULTS.where(tree_all_finite(value), result, RESULTS.nonfinite)
        safe_norm = jnp.where(norm_b > 0, norm_b, 1)
        return LinearSolution(
            value=value,
            residual=state.norm / safe_norm,
            tolerance=target / safe_norm,
            num_steps=state.num_steps,
            num_products=state.num_steps + num_products,
            result=result,
        )


class _State(NamedTuple):
    v: PyTree[Array]
    r: PyTree[Array]
    norm: Scalar
    num_steps: Int[Array, ""]
    result: RESULTS


class _Arnoldi(NamedTuple):
    basis: PyTree[Array]  # orthonormal, along a new first axis of every leaf
    hessenberg: Float[Array, "steps steps+1"]  # row k: A basis[k] in terms of the basis
    null: Float[Array, " steps+1"]  # orthogonal to the rows, null[0] = 1
    norm: Scalar  # of the residual
    num_steps: Int[Array, ""]


def _cycle(
    matvec: Callable[[PyTree], PyTree], r: PyTree[Array], norm: Scalar, target: Scalar, length: int
) -> tuple[PyTree, PyTree, Int[Array, ""]]:
    """Change of the solution, change of the residual, and steps of one cycle.

    In the basis `Q` of the Krylov space, `A Q_k = Q_{k+1} H`, the residual is
    `Q (norm e_0 - H y)`, smallest where it is parallel to the null vector `n` of `H'`.
    With `n_0 = 1` its norm is therefore `norm / ||n||`, known without solving for `y`.
    """
    eps = float(jnp.finfo(norm.dtype).eps)

    def step(s: _Arnoldi) -> _Arnoldi:
        k = s.num_steps
        q = matvec(jtu.tree_map(lambda x: x[k], s.basis))
        size = tree_norm(q)
        first = _dot(s.basis, q)
        q = tree_sub(q, _combine(first, s.basis))
        # Twice is enough: the second pass removes what rounding left of the first.
        second = _dot(s.basis, q)
        q = tree_sub(q, _combine(second, s.basis))
        row, rest = first + second, tree_norm(q)
        is_new = ~(rest <= eps * size)  # else the space is invariant
        safe = jnp.where(is_new, rest, 1)
        basis = jtu.tree_map(
            lambda x, y: x.at[k + 1].set(jnp.where(is_new, y / safe, 0)), s.basis, q
        )
        row = row.at[k + 1].set(jnp.where(is_new, rest, 0))
        null = s.null.at[k + 1].set(jnp.where(is_new, -(s.null @ row) / safe, 0))
        new_norm = jnp.where(is_new, norm / jnp.sqrt(null @ null), 0)
        return _Arnoldi(basis, s.hessenberg.at[k].set(row), null, new_norm, k + 1)

    start = _Arnoldi(
        jtu.tree_map(lambda x: jnp.zeros((length + 1, *x.shape), x.dtype).at[0].set(x / norm), r),
        jnp.zeros((length, length + 1), norm.dtype),
        jnp.zeros(length + 1, norm.dtype).at[0].set(1),
        norm,
        jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(lambda s: (s.norm > target) & (s.num_steps < length), step, start)
    # The rows that were not reached are zero, and so are their coefficients.
    right = jnp.zeros(length + 1, norm.dtype).at[0].set(norm)
    y = factorise(lambda a, b: jnp.linalg.lstsq(a, b)[0], end.hessenberg.T, right)
    basis = jtu.tree_map(lambda x: x[:-1], end.basis)
    return _combine(y, basis), _combine(y @ end.hessenberg, end.basis), end.num_steps


def _dot(basis: PyTree[Array], x: PyTree[Array]) -> Float[Array, " steps"]:
    leaves = zip(jtu.tree_leaves(basis), jtu.tree_leaves(x), strict=True)
    products = [jnp.tensordot(q, y, axes=y.ndim) for q, y in leaves]
    return jnp.sum(jnp.stack(products), axis=0)


def _combine(coefficients: Float[Array, " steps"], basis: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda q: jnp.tensordot(coefficients, q, axes=1), basis)
