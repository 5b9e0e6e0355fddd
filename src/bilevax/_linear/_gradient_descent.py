"""Gradient descent on the quadratic `1/2 v'A v - v'b`."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Scalar

from .._checks import check_count, check_step_size, check_tolerance
from .._results import RESULTS
from .._tree import (
    tree_all_finite,
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_sub,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import find_step_size, scaled_start, target_norm

# The residual cannot grow at all if A is symmetric; otherwise it may for a while.
_GROWTH = 10.0
# Without a smaller residual in this many steps the rounding errors have taken over.
_PATIENCE = 100


class GradientDescent(AbstractIterativeLinearSolver):
    """Gradient descent for `A v = b`: `v <- v - step_size (A v - b)`.

    **Arguments:**

    - `step_size`: by default `1 / (1.05 m)`, `m` the largest eigenvalue by ten steps of
        the power method; for a system that is known not to be symmetric (`Root`,
        `FixedPoint`) by default 1. Must be below `2 / m`.
    - `rtol`, `atol`: stop when `||b - A v|| <= atol + rtol ||b||`; `rtol=None` is 1e-6
        in float64 and 1e-4 below.
    - `max_steps`: flagged if it is reached first.
    - `num_steps`: exactly this many steps instead; the residual is reported, not flagged.

    **Returns** (from `solve`): a `LinearSolution`. Outcomes: `diverged` (the residual
    grows: the step is too large), `negative_curvature` (it grows along itself),
    `singular`, `stalled`, `nonfinite`, `adjoint_not_converged`; then the value is the last finite
    iterate. A guess `v0` worse than zero is dropped.

    **Cost:** one product per step, ten for the step size; four vectors.

    **Exact when** `A` is symmetric positive definite with eigenvalues in `[mu, m]`: the
    error falls by `1 - step_size mu` per step, that is `m / mu` steps per digit and more.
    `CG` is faster; this one is for comparison, and for singular systems, where the null
    space does no harm to the rest.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[3.0, 1.0], [1.0, 2.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.GradientDescent(num_steps=100).solve(lambda v: A @ v, b)
        ```

    Reference: Nesterov, "Lectures on convex optimization" (2018), theorem 2.1.15.
    """

    step_size: float | Scalar | None = None
    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    max_steps: int = 10_000
    num_steps: int | None = None

    def __check_init__(self) -> None:
        check_step_size("GradientDescent", self.step_size)
        check_tolerance("GradientDescent", rtol=self.rtol, atol=self.atol)
        check_count("GradientDescent", max_steps=self.max_steps, num_steps=self.num_steps)

    def for_nonsymmetric(self) -> "GradientDescent":
        # The largest eigenvalue says nothing about convergence here; for A = I - T' one does.
        return self if self.step_size is not None else dataclasses.replace(self, step_size=1.0)

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        precondition = (lambda r: r) if preconditioner is None else preconditioner
        scale, b, v, r, num_start = scaled_start(matvec, b, v0)
        norm_b = tree_norm(b)
        safe_norm = jnp.where(norm_b > 0, norm_b, 1)
        step_size, num_products = find_step_size(
            self.step_size, lambda u: precondition(matvec(u)), b
        )
        if self.num_steps is None:
            target = target_norm(self.rtol, self.atol, b, norm_b, scale)
            tolerance, limit, patience = target / safe_norm, self.max_steps, _PATIENCE
        else:
            target, tolerance = jnp.zeros_like(norm_b), None
            limit, patience = self.num_steps, self.num_steps + 1

        def step(s: _State) -> _State:
            v = tree_axpy(step_size, precondition(s.r), s.v)
            return _next(s, v, tree_sub(b, matvec(v)), patience)

        state = jax.lax.while_loop(
            lambda s: (s.result == RESULTS.successful) & (s.norm > target) & (s.num_steps < limit),
            step,
            _start(v, r),
        )
        value, result = tree_scale(scale, state.v), state.result
        if self.num_steps is None:
            is_late = (result == RESULTS.successful) & (state.norm > target)
            result = RESULTS.where(is_late, RESULTS.adjoint_not_converged, result)
        result = RESULTS.where(tree_all_finite(value), result, RESULTS.nonfinite)
        num_products = num_products + num_start + state.num_steps
        return LinearSolution(
            value, state.norm / safe_norm, tolerance, state.num_steps, num_products, result
        )


class _State(eqx.Module):
    # every step
    v: PyTree[Array]
    r: PyTree[Array]  # b - A v
    norm: Scalar
    num_steps: Int[Array, ""]
    # at a new smallest residual
    best_norm: Scalar
    best_step: Int[Array, ""]
    # once
    first_norm: Scalar
    # reported
    result: RESULTS


def _start(v: PyTree[Array], r: PyTree[Array]) -> _State:
    norm, zero = tree_norm(r), jnp.zeros((), jnp.int32)
    result = RESULTS.where(jnp.isfinite(norm), RESULTS.successful, RESULTS.nonfinite)
    return _State(v, r, norm, zero, norm, zero, norm, result)


def _next(s: _State, v: PyTree[Array], r: PyTree[Array], patience: int) -> _State:
    """The state at `v`, and what is to be said of its residual `r`."""
    num_steps = s.num_steps + 1
    norm, overlap = tree_norm(r), tree_dot(s.r, r)
    is_best = norm < s.best_norm
    best_step = jnp.where(is_best, num_steps, s.best_step)
    # Along negative curvature the residual grows and keeps its direction; where the step
    # is too large it turns round. Neither growing nor shrinking, it is the part of b in
    # the null space or, if it is that small, the rounding errors.
    growth = RESULTS.where(overlap > 0, RESULTS.negative_curvature, RESULTS.diverged)
    is_floor = norm < float(jnp.finfo(norm.dtype).eps) ** 0.5 * s.first_norm
    floor = RESULTS.where(is_floor, RESULTS.stalled, RESULTS.singular)
    late = RESULTS.where(norm > 2 * s.best_norm, growth, floor)
    result = RESULTS.where(num_steps - best_step >= patience, late, RESULTS.successful)
    result = RESULTS.where(norm > _GROWTH * s.best_norm, growth, result)
    result = RESULTS.where(jnp.isfinite(norm), result, RESULTS.nonfinite)
    best_norm = jnp.minimum(norm, s.best_norm)
    return _State(v, r, norm, num_steps, best_norm, best_step, s.first_norm, result)
