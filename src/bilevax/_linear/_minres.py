"""MINRES in the range of the matrix: indefinite and singular symmetric systems."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._results import RESULTS
from .._tree import (
    signs_like,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
    unbounded,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import scaled_start, step_limit, target_norm
from ._minres_pass import Pass, System, run_pass


class MINRES(AbstractIterativeLinearSolver):
    """Minimal residuals for `A v = b`, `A` symmetric, possibly singular or indefinite.

    The k-th iterate minimises `||b - A v||` over the span of `A b, ..., A^k b` (textbook
    MINRES: of `b, ..., A^(k-1) b`). The iterates are therefore in the range of `A`, nothing
    of its null space ever enters, and what they converge to is `A^+ b`, the least-squares
    solution of smallest norm, at one product more.

    **Arguments:**

    - `rtol`, `atol`: stop when `||b - A v|| <= atol + rtol ||b||`; `rtol=None` is 1e-6 in
        float64 and 1e-4 below. That a system has no solution is known only when `A r` is
        zero up to rounding: before, `r` may belong to a small eigenvalue.
    - `max_steps`: by default ten times the size of `b`, at most 10,000.
    - `num_steps`: exactly this many steps, instead of tolerances (fewer only where the
        residual, or `A r`, is down to rounding); the residual is reported, not flagged.
    - `minimum_norm`: accept inconsistent systems: the residual of `A^+ b` is reported, not
        flagged. A guess, whose part in the null space would stay, and a preconditioner,
        which would change the norm, are then not used.
    - `indefinite`: accept negative eigenvalues, as saddle points have on purpose.

    **Returns** (from `solve`): a `LinearSolution`. A guess worse than zero is dropped. The
    preconditioner must be symmetric positive definite; the steps minimise the residual
    in its norm, the stopping rule uses the plain one. Outcomes: `singular` (inconsistent),
    `negative_curvature` (the Lanczos matrix has an eigenvalue below zero by more than
    rounding, and so has `A`), `stalled`, `nonfinite`, `adjoint_not_converged`.

    **Cost:** one product per step and four; ten vectors. With a preconditioner three
    applications of it per step.

    **Exact when** `A` is symmetric: in as many steps as it has distinct eigenvalues. On
    definite systems the rate is that of `CG`; with eigenvalues on both sides of zero, that
    of the square of the condition number.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.MINRES(minimum_norm=True).solve(lambda v: A @ v, b)
        ```

    Reference: Paige and Saunders, "Solution of sparse indefinite systems of linear
    equations", SIAM J. Numer. Anal. 12 (1975), section 6; begun with `A b` by Hanke,
    "Conjugate gradient type methods for ill-posed problems" (1995), chapter 6 (MR-II).
    """

    needs: ClassVar[str] = "symmetric"

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    max_steps: int | None = None
    num_steps: int | None = None
    minimum_norm: bool = False
    indefinite: bool = False

    def __check_init__(self) -> None:
        check_tolerance("MINRES", rtol=self.rtol, atol=self.atol)
        check_count("MINRES", max_steps=self.max_steps, num_steps=self.num_steps)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        if self.minimum_norm:
            v0, preconditioner = None, None
        scale, b, v, r, num_products = scaled_start(matvec, b, v0)
        norm_b = tree_norm(b)
        eps = float(jnp.finfo(norm_b.dtype).eps)
        if self.num_steps is None:
            target = target_norm(self.rtol, self.atol, b, norm_b, scale)
            limit = step_limit(self.max_steps, b)
        else:
            # Beyond this the steps are rounding errors.
            target, limit = 3 * eps * norm_b, self.num_steps
        system = System(matvec, preconditioner, target, limit, self.indefinite)
        state = jax.lax.while_loop(
            lambda s: s.is_running,
            lambda s: self._pass(s, b, system),
            _start(system, v, r, num_products),
        )
        return self._finish(state, scale, norm_b, target)

    def _pass(self, s: "_State", b: PyTree[Array], system: System) -> "_State":
        """A Lanczos process from the residual; then nothing is believed but products.

        The recursive residual drifts away from the true one: a new process from the
        measured residual goes on from there.
        """
        run = run_pass(system, s.v, s.r, s.Ar, s.norm, s.num_steps)
        r, Ar = _measure(system, b, run.v)
        size, size_Ar = tree_norm(r), system.norm(Ar)
        old_size, old_Ar = tree_norm(s.r), system.norm(s.Ar)
        is_finite = jnp.isfinite(size) & jnp.isfinite(size_Ar)
        is_reached = size <= system.target
        is_null = _is_null(system, run, r, size_Ar)
        is_progress = (size <= 0.5 * old_size) | (size_Ar <= 0.5 * old_Ar)
        # A process that broke down may have let the null space in.
        is_least_squares = is_null & ~(run.is_broken & self.minimum_norm)

        result = RESULTS.where(is_progress, RESULTS.successful, RESULTS.stalled)
        is_good = is_reached | is_least_squares
        result = RESULTS.where(is_good | (self.num_steps is not None), RESULTS.successful, result)
        if self.num_steps is None and not self.minimum_norm:
            is_singular = is_least_squares & ~is_reached
            result = RESULTS.where(is_singular, RESULTS.singular, result)
        is_late = ~is_good & (run.num_steps >= system.limit)
        if self.num_steps is None:
            result = RESULTS.where(is_late, RESULTS.adjoint_not_converged, result)
        result = RESULTS.where(run.is_negative, RESULTS.negative_curvature, result)
        result = RESULTS.where(is_finite & run.is_finite, result, RESULTS.nonfinite)

        # Worse than before: rounding errors have taken over.
        keep = ~is_finite | ((size > old_size) & (size_Ar > old_Ar))
        v, r, Ar = tree_where(keep, (s.v, s.r, s.Ar), (run.v, r, Ar))
        is_failed = result != RESULTS.successful
        is_done = is_good | is_failed | is_late | (self.num_steps is not None)
        return _State(
            *(v, r, Ar, run.norm, run.num_steps),
            num_products=s.num_products + run.num_steps - s.num_steps + 2,
            is_least_squares=is_least_squares & ~is_reached,
            is_running=~is_done,
            result=result,
        )

    def _finish(
        self, state: "_State", scale: Scalar, norm_b: Scalar, target: Scalar
    ) -> LinearSolution:
        safe_norm = jnp.where(norm_b > 0, norm_b, 1)
        tolerance = None if self.num_steps is not None else target / safe_norm
        if tolerance is not None and self.minimum_norm:
            is_reported = state.is_least_squares
            tolerance = jnp.where(is_reported, unbounded(tolerance), tolerance)
        return LinearSolution(
            value=tree_scale(scale, state.v),
            residual=tree_norm(state.r) / safe_norm,
            tolerance=tolerance,
            num_steps=state.num_steps,
            num_products=state.num_products,
            result=state.result,
        )

    def assume_full_rank(self) -> bool:
        return not self.minimum_norm


class _State(eqx.Module):
    # every pass; Ar is A times the (preconditioned) residual, norm that of A, from below
    v: PyTree[Array]
    r: PyTree[Array]
    Ar: PyTree[Array]
    norm: Scalar
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    # reported
    is_least_squares: Bool[Array, ""]
    is_running: Bool[Array, ""]
    result: RESULTS


def _start(
    system: System, v: PyTree[Array], r: PyTree[Array], num_products: Int[Array, ""]
) -> _State:
    """`A r`, and how large `A` is: on a fixed pattern, for `r` may be in the null space."""
    z, signs = system.precondition(r), jtu.tree_map(signs_like, r)
    pair = jtu.tree_map(lambda x, y: jnp.stack([x, y]), z, system.precondition(signs))
    Ar, other = _unstack(jax.lax.map(system.matvec, pair))
    size = jnp.sqrt(jnp.abs(tree_dot(signs, system.precondition(signs))))
    norm = system.norm(other) / jnp.where(size > 0, size, 1)
    size = tree_norm(r)
    is_finite = jnp.isfinite(size) & jnp.isfinite(system.norm(Ar)) & jnp.isfinite(norm)
    result = RESULTS.where(is_finite, RESULTS.successful, RESULTS.nonfinite)
    return _State(
        *(v, r, Ar, norm, jnp.zeros((), jnp.int32)),
        num_products=num_products + 2,
        is_least_squares=jnp.zeros((), bool),
        is_running=is_finite & (size > system.target),
        result=result,
    )


def _measure(system: System, b: PyTree[Array], v: PyTree[Array]) -> tuple[PyTree, PyTree]:
    """`r = b - A v` and `A P r`, in a loop so that the product is compiled once."""

    def body(k: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        r, x = carry
        q = system.matvec(x)
        new_r = tree_where(k == 0, tree_sub(b, q), r)
        return new_r, tree_where(k == 0, system.precondition(new_r), q)

    return jax.lax.fori_loop(0, 2, body, (b, v))


def _is_null(system: System, run: Pass, r: PyTree[Array], size_Ar: Scalar) -> Bool[Array, ""]:
    """Whether `A r` is zero: to the digits of `r`, or in the recurrences and to those of `A v`."""
    size, eps = system.norm(r), float(jnp.finfo(run.norm.dtype).eps)
    if system.preconditioner is None:
        rounding = 20 * eps * run.norm**2 * tree_norm(run.v)
    else:
        # The norm of v in this geometry is not known; and only `singular` depends on it.
        rounding = jnp.sqrt(eps) * run.norm * size
    return size_Ar <= 2 * run.floor * size + jnp.where(run.is_null, rounding, 0)


def _unstack(pair: PyTree[Array]) -> tuple[PyTree, PyTree]:
    return tuple(jtu.tree_map(lambda x, i=i: x[i], pair) for i in (0, 1))
