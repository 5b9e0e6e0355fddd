"""Conjugate gradients on pytrees, with an outcome for everything that can go wrong."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._results import RESULTS
from .._tree import (
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_where,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import scaled_start, step_limit, target_norm

# The recursive residual drifts away from b - A v. Where a bound on the drift passes a tenth
# of the residual, one product measures it, at most every 50 steps (two per cent).
_DRIFT = 0.1
_REFRESH_EVERY = 50
# Curvature this many rounding errors from zero is not an accident of rounding.
_ROUNDING = 100.0
# A solution this much larger than b needs a condition number as large: past the precision,
# and past what CG resolves in any number of steps that it is given.
_LARGEST_SOLUTION = 1e10


class CG(AbstractIterativeLinearSolver):
    """Conjugate gradients for `A v = b`, `A` symmetric positive definite.

    Stops when `||b - A v|| <= atol + rtol ||b||` in the two-norm, relative to `b` and not
    to the first residual, so that a good guess saves steps. With `num_steps=K` it takes
    K steps (fewer only where the residual is down to rounding), and the residual is
    reported, not flagged.

    **Arguments:**

    - `rtol`, `atol`: tolerances; `rtol=None` is 1e-6 in float64 and 1e-4 below.
    - `max_steps`: by default ten times the size of `b`, at most 10,000.
    - `num_steps`: exactly this many steps, instead of tolerances.

    **Returns** (from `solve`): a `LinearSolution`. A guess `v0` whose residual is larger
    than that of zero is dropped. The preconditioner approximates the inverse of `A` and
    must be positive definite; the stopping rule uses the unpreconditioned residual.
    Outcomes: `negative_curvature` (`p'Ap <= 0`), `singular` (`p'Ap = 0` up to rounding
    and `A p = 0`, or a `v` as large as only a singular `A` makes it), `stalled` (the true
    residual no longer follows the recursive one), `nonfinite`, `adjoint_not_converged`
    (`max_steps`, or a preconditioner that is not positive definite); then the value is
    the last good iterate.

    **Cost:** one product per step, one more per 50 steps and one for `v0`; four vectors.

    **Exact when** `A` is symmetric positive definite: the error falls at least by
    `(sqrt(k) - 1) / (sqrt(k) + 1)` per step, `k` the condition number.

    !!! example

        ```python
        import jax.numpy as jnp
        import lineax as lx
        import bilevax as bx

        A = jnp.array([[3.0, 1.0], [1.0, 2.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.CG(rtol=1e-5).solve(lambda v: A @ v, b)
        print(solution.value, solution.residual, bx.RESULTS[solution.result])
        lx.linear_solve(lx.MatrixLinearOperator(A), b, solver=bx.linear.CG())
        ```

    Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear
    systems", J. Res. Nat. Bur. Standards 49 (1952), equations (3:1).
    """

    needs: ClassVar[str] = "symmetric positive definite"

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    max_steps: int | None = None
    num_steps: int | None = None

    def __check_init__(self) -> None:
        check_tolerance("CG", rtol=self.rtol, atol=self.atol)
        check_count("CG", max_steps=self.max_steps, num_steps=self.num_steps)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        scale, b, v, r, num_products = scaled_start(matvec, b, v0)
        norm_b = tree_norm(b)
        tolerance, limit = self._stopping_rule(b, norm_b, scale)
        system = _System(matvec, b, preconditioner, tolerance, self.num_steps is None)
        state = jax.lax.while_loop(
            lambda s: s.is_running & ((s.num_steps < limit) | s.refresh),
            lambda s: _step(s, system),
            _start(system, v, r, num_products),
        )
        if preconditioner is None:
            state = _post_mortem(state, norm_b)
        return self._finish(state, scale, norm_b, tolerance)

    def _stopping_rule(self, b: PyTree[Array], norm_b: Scalar, scale: Scalar) -> tuple[Scalar, int]:
        """What the norm of the residual must reach, and the most steps."""
        if self.num_steps is not None:
            # Beyond this the steps are rounding errors, and would amplify them.
            return float(jnp.finfo(norm_b.dtype).eps) * norm_b, self.num_steps
        tolerance = target_norm(self.rtol, self.atol, b, norm_b, scale)
        return tolerance, step_limit(self.max_steps, b)

    def _finish(
        self, state: "_State", scale: Scalar, norm_b: Scalar, tolerance: Scalar
    ) -> LinearSolution:
        value, result = tree_scale(scale, state.v), state.result
        safe_norm = jnp.where(norm_b > 0, norm_b, 1)
        if self.num_steps is None:
            late = state.is_running & (result == RESULTS.successful)
            result = RESULTS.where(late, RESULTS.adjoint_not_converged, result)
        asked = None if self.num_steps is not None else tolerance / safe_norm
        residual = jnp.sqrt(state.rr) / safe_norm
        return LinearSolution(value, residual, asked, state.num_steps, state.num_products, result)


class _System(NamedTuple):
    matvec: Callable[[PyTree], PyTree]
    b: PyTree[Array]
    preconditioner: Callable[[PyTree], PyTree] | None
    tolerance: Scalar
    measures: bool  # the true residual, every so often


class _State(eqx.Module):
    # every step; p is the next direction, rr = r'r, rho = r'z, pp = p'p in the geometry
    # of the preconditioner, max_curvature the largest p'Ap / p'p so far
    v: PyTree[Array]
    r: PyTree[Array]
    p: PyTree[Array]
    rr: Scalar
    rho: Scalar
    pp: Scalar
    max_curvature: Scalar
    # the next product measures the true residual; steps since the last one, the bound on
    # the drift since then, and r'r at the last restart
    refresh: Bool[Array, ""]
    since: Int[Array, ""]
    drift: Scalar
    restart_rr: Scalar
    # reported
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    is_running: Bool[Array, ""]
    result: RESULTS


def _start(
    system: _System, v: PyTree[Array], r: PyTree[Array], num_products: Int[Array, ""]
) -> _State:
    z, rr, rho = _products(system, r)
    result = _residual_result(rr, rho)
    is_running = (rr > system.tolerance**2) & (result == RESULTS.successful)
    zero, false = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    inf = jnp.full_like(rr, jnp.inf)
    scalars = (rr, rho, rho, 0 * rr, false, zero, 0 * rr, inf, zero, num_products)
    return _State(v, r, z, *scalars, is_running, result)


def _products(system: _System, r: PyTree[Array]) -> tuple[PyTree[Array], Scalar, Scalar]:
    """The preconditioned residual `z`, `r'r` and `r'z`."""
    rr = tree_dot(r, r)
    if system.preconditioner is None:
        return r, rr, rr
    z = system.preconditioner(r)
    return z, rr, tree_dot(r, z)


def _residual_result(rr: Scalar, rho: Scalar) -> RESULTS:
    """What the new residual says: is it finite, and the preconditioner definite?"""
    result = RESULTS.where((rho > 0) | (rr == 0), RESULTS.successful, RESULTS.adjoint_not_converged)
    return RESULTS.where(jnp.isfinite(rr) & jnp.isfinite(rho), result, RESULTS.nonfinite)


def _step(s: _State, system: _System) -> _State:
    # Scalars do the branching: each vector is passed over as often as in a bare loop.
    refresh, measures = s.refresh, system.measures
    q = system.matvec(tree_where(refresh, s.v, s.p) if measures else s.p)
    pq = tree_dot(s.p, q)
    eps = float(jnp.finfo(pq.dtype).eps)
    # False also where pq is not a number.
    is_good = refresh | (pq > eps * s.max_curvature * s.pp)
    is_step = is_good & ~refresh

    # 1. new iterate; r is r - alpha q, or b - q at a refresh, or q for the post-mortem
    alpha = jnp.where(is_step, s.rho / jnp.where(is_step, pq, 1), 0)
    v = tree_axpy(alpha, s.p, s.v)
    keep = jnp.where(is_step, 1, 0).astype(pq.dtype)
    scale_q = jnp.where(is_step, alpha, jnp.where(is_good, 1, -1))
    if measures:
        base = jtu.tree_map(lambda x, y: jnp.where(refresh, x, keep * y), system.b, s.r)
    else:
        base = tree_scale(keep, s.r)
    r = tree_axpy(-scale_q, q, base)

    # 2. new direction z + beta p; at a refresh the old one, or z if the residuals differ
    z, rr, rho = _products(system, r)
    restart = refresh & (rr > 1.1**2 * s.rr)
    beta = jnp.where(refresh, jnp.where(restart, 0, 1), rho / s.rho)
    scale_z = jnp.where(refresh & ~restart, 0, 1).astype(pq.dtype)
    p = jtu.tree_map(lambda x, y: scale_z * x + beta * y, z, s.p)
    pp = scale_z * rho + beta**2 * s.pp

    # 3. outcome
    result = _residual_result(rr, rho)
    # A restart that does not halve the true residual has met the floor.
    stalled = restart & (rr > 0.5**2 * s.restart_rr)
    result = RESULTS.where(stalled, RESULTS.stalled, result)
    result = RESULTS.where(is_good, result, _bad_curvature(s, pq, rho))
    failed = result != RESULTS.successful
    rr = jnp.where(is_good & jnp.isfinite(rr), rr, s.rr)
    since = jnp.where(refresh, 0, s.since + 1)
    reached = rr <= system.tolerance**2
    curvature = jnp.maximum(s.max_curvature, jnp.where(is_step, pq / s.pp, 0))
    # Each step errs by eps ||A|| ||alpha p||: van der Vorst and Ye (2000), equation (24).
    # A restart has shown the bound to be too small: the next claim is measured too.
    drift = s.drift + eps * curvature * alpha * jnp.sqrt(s.pp)
    drift = jnp.where(refresh, jnp.where(restart, jnp.inf, 0), drift)
    drifted = (drift**2 > _DRIFT**2 * rho) & measures
    return _State(
        *(v, r, p, rr, rho, pp, curvature),
        refresh=drifted & (reached | (since >= _REFRESH_EVERY)) & ~failed,
        since=since,
        drift=drift,
        restart_rr=jnp.where(restart, rr, s.restart_rr),
        num_steps=s.num_steps + is_step.astype(jnp.int32),
        num_products=s.num_products + 1,
        is_running=~failed & ~(reached & (refresh | ~drifted)),
        result=result,
    )


def _post_mortem(s: _State, norm_b: Scalar) -> _State:
    """Stalled, or out of steps, with a `v` that has grown beyond all bounds: singular.

    Where `b` has a part in the null space, rounding gives that part a curvature, and the
    steps along it are as long as that is small: `||A|| ||v|| / ||b||` ends near `1 / eps`.
    What curvature is then met further on is that of rounding errors too.
    """
    largest = min(0.1 / float(jnp.finfo(norm_b.dtype).eps), _LARGEST_SOLUTION)
    is_large = s.max_curvature * tree_norm(s.v) > largest * norm_b
    is_open = s.is_running | (s.result == RESULTS.stalled)
    is_open |= s.result == RESULTS.negative_curvature
    result = RESULTS.where(is_large & is_open, RESULTS.singular, s.result)
    return eqx.tree_at(lambda s: s.result, s, result)


def _bad_curvature(s: _State, pq: Scalar, qq: Scalar) -> RESULTS:
    """Why `p'Ap` is not positive, from `q = A p`; `qq` is `q'q`.

    A semidefinite `A` has `q'q <= ||A|| p'q`: where `p'q` is zero up to rounding and `q`
    is not, `A` is indefinite; where both are, `p` is in the null space.
    """
    eps = _ROUNDING * float(jnp.finfo(pq.dtype).eps)
    norm = jnp.maximum(s.max_curvature, jnp.sqrt(jnp.maximum(qq, 0) / s.pp))
    is_negative = (pq < -eps * norm * s.pp) | (qq > eps * norm**2 * s.pp)
    # After a restart the recurrence for p'p is only roughly right.
    singular = RESULTS.where(jnp.isfinite(s.restart_rr), RESULTS.stalled, RESULTS.singular)
    result = RESULTS.where(is_negative, RESULTS.negative_curvature, singular)
    return RESULTS.where(jnp.isfinite(pq) & jnp.isfinite(qq), result, RESULTS.nonfinite)
