"""Chebyshev semi-iteration: no inner products in the loop."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._checks import check_count, check_tolerance
from .._results import RESULTS
from .._tree import (
    signs_like,
    tree_all_finite,
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_size,
    tree_where,
    tree_zeros_like,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._common import scaled_start, target_norm
from ._in_turn import factorise

_CHECK_EVERY = 10
_LANCZOS_STEPS = 20
# Inside the bounds the residual cannot grow at all.
_GROWTH = 10.0


class Chebyshev(AbstractIterativeLinearSolver):
    """Chebyshev semi-iteration for `A v = b`, the eigenvalues of `A` in `[mu, m]`.

    The residual is `T_k((m + mu - 2 A) / (m - mu)) b`, scaled to be `b` for `A = 0`, `T_k`
    the Chebyshev polynomial: the best that K steps fixed beforehand can do. There is no
    inner product in the steps, so that the parts of a sharded `v` need not wait for each
    other; with tolerances there is one norm every ten steps.

    **Arguments:**

    - `bounds`: `(mu, m)`, numbers or arrays; with a preconditioner, of the preconditioned
        matrix. By default half the smallest and 1.05 times the largest of the
        eigenvalues of 20 Lanczos steps (plus the error bound of the latter). A `mu` that
        is too large makes it slow, an `m` that is too small makes it diverge.
    - `rtol`, `atol`: stop when `||b - A v|| <= atol + rtol ||b||`; `rtol=None` is 1e-6
        in float64 and 1e-4 below.
    - `max_steps`: flagged if it is reached first; ten steps that have begun are finished.
    - `num_steps`: exactly this many steps instead; the residual is reported, not flagged.

    **Returns** (from `solve`): a `LinearSolution`. A guess `v0` worse than zero is dropped.
    Outcomes: `diverged` (an eigenvalue is above `m`), `negative_curvature` (one is below
    zero: among those of Lanczos, or the residual grows along it), `singular` (what
    remains is in the null space), `nonfinite`, `adjoint_not_converged`.

    **Cost:** one product per step, 20 for the bounds, one where it fails; four vectors.

    **Exact when** the bounds hold: the error falls by `(sqrt(k) - 1) / (sqrt(k) + 1)` per
    step, `k = m / mu`, as the bound for `CG`, which profits from gaps in the spectrum.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.array([[3.0, 1.0], [1.0, 2.0]])
        b = jnp.array([1.0, 0.0])
        solution = bx.linear.Chebyshev(bounds=(1.0, 4.0), num_steps=20).solve(lambda v: A @ v, b)
        ```

    Reference: Golub and Varga, "Chebyshev semi-iterative methods, successive
    overrelaxation iterative methods, and second order Richardson iterative methods",
    Numer. Math. 3 (1961), section 2.
    """

    needs: ClassVar[str] = "symmetric positive definite"

    bounds: tuple[float | Scalar, float | Scalar] | None = None
    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    max_steps: int = 10_000
    num_steps: int | None = None

    def __check_init__(self) -> None:
        check_tolerance("Chebyshev", rtol=self.rtol, atol=self.atol)
        check_count("Chebyshev", max_steps=self.max_steps, num_steps=self.num_steps)
        if self.bounds is None:
            return
        if not isinstance(self.bounds, tuple) or len(self.bounds) != 2:
            raise ValueError(f"Chebyshev(bounds=...) must be (mu, m); got {self.bounds!r}.")
        are_numbers = all(isinstance(x, (int, float)) for x in self.bounds)
        if are_numbers and not 0 < self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"Chebyshev(bounds=(mu, m)) needs 0 < mu <= m; got {self.bounds}.")

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        precondition = (lambda r: r) if preconditioner is None else preconditioner
        scale, b, v, r, num_products = scaled_start(matvec, b, v0)
        norm_b, size = tree_norm(b), tree_size(b)
        if self.bounds is None:
            lowest, mu, m = _estimate_bounds(matvec, precondition, b)
            num_products = num_products + min(_LANCZOS_STEPS, size)
            # What is smaller cannot be resolved in max_steps, and would slow down the rest.
            mu = jnp.maximum(mu, (5 / self.max_steps) ** 2 * m)
        else:
            mu, m = (jnp.asarray(x, norm_b.dtype) for x in self.bounds)
            lowest = mu
        is_negative = lowest < -100 * float(jnp.finfo(norm_b.dtype).eps) * m
        polynomial = _Polynomial((m + mu) / 2, (m - mu) / 2)

        def step(_: Array, s: _State) -> _State:
            return _step(s, polynomial, matvec, precondition)

        state = _start(v, r, precondition, polynomial)
        if self.num_steps is None:
            target = target_norm(self.rtol, self.atol, b, norm_b, scale)
            first = tree_norm(r)
            state, norm = jax.lax.while_loop(
                lambda c: (
                    ~is_negative
                    & (c[1] > target)
                    & (c[1] <= _GROWTH * first)
                    & (c[0].num_steps < self.max_steps)
                ),
                lambda c: _with_norm(jax.lax.fori_loop(0, _CHECK_EVERY, step, c[0]), c[0]),
                (state, first),
            )
            is_reached, tolerance = norm <= target, target / jnp.where(norm_b > 0, norm_b, 1)
        else:
            state = jax.lax.fori_loop(0, self.num_steps, step, state)
            norm, first = tree_norm(state.r), tree_norm(r)
            is_reached = norm <= _GROWTH * first
            tolerance = None
        result, extra = _outcome(is_reached, is_negative, state, norm, first, m, matvec)
        finite = jnp.isfinite(norm) & jnp.isfinite(m) & jnp.isfinite(mu)
        finite = finite & tree_all_finite(state.v)
        return LinearSolution(
            value=tree_scale(scale, tree_where(finite, state.v, v)),
            residual=norm / jnp.where(norm_b > 0, norm_b, 1),
            tolerance=tolerance,
            num_steps=state.num_steps,
            num_products=num_products + state.num_steps + extra,
            result=RESULTS.where(finite, result, RESULTS.nonfinite),
        )


class _Polynomial(NamedTuple):
    centre: Scalar
    radius: Scalar


class _State(eqx.Module):
    # every step; rho is T_k / T_{k+1} at the centre over the radius
    v: PyTree[Array]
    r: PyTree[Array]
    direction: PyTree[Array]
    rho: Scalar
    # reported
    num_steps: Int[Array, ""]


def _start(
    v: PyTree[Array], r: PyTree[Array], precondition: Callable, polynomial: _Polynomial
) -> _State:
    centre, radius = polynomial
    direction = tree_scale(1 / jnp.where(centre > 0, centre, 1), precondition(r))
    rho = radius / jnp.where(centre > 0, centre, 1)
    return _State(v, r, direction, rho, jnp.zeros((), jnp.int32))


def _step(s: _State, polynomial: _Polynomial, matvec: Callable, precondition: Callable) -> _State:
    """Saad, "Iterative methods for sparse linear systems" (2003), algorithm 12.1.

    With `q = rho radius` for `1 / radius`, which is infinite where all eigenvalues agree:
    `2 rho' / radius = 2 / (2 centre - radius rho)`.
    """
    centre, radius = polynomial
    v = tree_axpy(1.0, s.direction, s.v)
    r = tree_axpy(-1.0, matvec(s.direction), s.r)
    scale = 2 * centre - radius * s.rho
    scale = 1 / jnp.where(scale > 0, scale, 1)
    rho = radius * scale
    direction = jtu.tree_map(
        lambda d, z: rho * s.rho * d + 2 * scale * z, s.direction, precondition(r)
    )
    return _State(v, r, direction, rho, s.num_steps + 1)


def _with_norm(state: _State, before: _State) -> tuple[_State, Scalar]:
    """Ten steps that ended in NaN or infinity are undone; their norm says what happened."""
    norm = tree_norm(state.r)
    finite = jnp.isfinite(norm)
    kept = tree_where(finite, (state.v, state.r), (before.v, before.r))
    return eqx.tree_at(lambda s: (s.v, s.r), state, kept), norm


def _outcome(
    is_reached: Array,
    is_negative: Array,
    state: _State,
    norm: Scalar,
    first: Scalar,
    m: Scalar,
    matvec: Callable,
) -> tuple[RESULTS, Int[Array, ""]]:
    """What the residual says, at one product where the tolerance was not reached."""

    def curvature() -> tuple[Scalar, Scalar]:
        r = tree_scale(1 / jnp.where(norm > 0, norm, 1), state.r)
        q = matvec(r)
        return tree_dot(r, q), tree_norm(q)

    # In the directions that grow, those outside of the bounds, the residual ends up.
    is_good = is_reached | is_negative
    rayleigh, size = jax.lax.cond(
        is_good, lambda: (jnp.ones_like(norm), jnp.ones_like(norm)), curvature
    )
    result = RESULTS.where(
        size <= float(jnp.finfo(norm.dtype).eps) ** 0.5 * m,
        RESULTS.singular,
        RESULTS.adjoint_not_converged,
    )
    growth = RESULTS.where(rayleigh < 0, RESULTS.negative_curvature, RESULTS.diverged)
    result = RESULTS.where(norm <= _GROWTH * first, result, growth)
    result = RESULTS.where(is_reached, RESULTS.successful, result)
    result = RESULTS.where(is_negative, RESULTS.negative_curvature, result)
    return result, jnp.where(is_good, 0, 1).astype(jnp.int32)


def _estimate_bounds(
    matvec: Callable, precondition: Callable, b: PyTree[Array]
) -> tuple[Scalar, Scalar, Scalar]:
    """The smallest Ritz value, and bounds from below and above, by a few Lanczos steps.

    Started from `b` plus a fixed pattern of signs: `b` may see less than the whole.
    """
    num_steps = min(_LANCZOS_STEPS, tree_size(b))
    y = jtu.tree_map(lambda x: x + signs_like(x), b)
    y, z, beta = _normalised(y, precondition)
    zero, one = jnp.zeros_like(beta), jnp.ones_like(beta)
    if num_steps == 0:
        return one, one, one
    matrix = jnp.zeros((num_steps + 1, num_steps + 1), beta.dtype)

    def step(k: Array, carry: tuple) -> tuple:
        matrix, norm, beta, y, z, old = carry
        q = matvec(z)
        alpha = tree_dot(z, q)
        q = jtu.tree_map(lambda q, y, o: q - alpha * y - beta * o, q, y, old)
        # Where the space is exhausted, an eigenvalue inside the spectrum fills the rest.
        alpha = jnp.where(tree_dot(y, z) > 0, alpha, matrix[0, 0])
        new_y, new_z, new_beta = _normalised(q, precondition)
        norm = jnp.maximum(norm, jnp.abs(alpha) + beta + new_beta)
        is_new = ~(new_beta <= 100 * float(jnp.finfo(norm.dtype).eps) * norm)  # NaN goes on
        new_beta = jnp.where(is_new, new_beta, 0)
        new_y, new_z = jtu.tree_map(lambda x: jnp.where(is_new, x, 0), (new_y, new_z))
        matrix = matrix.at[k, k].set(alpha)
        matrix = matrix.at[k + 1, k].set(new_beta).at[k, k + 1].set(new_beta)
        return matrix, norm, new_beta, new_y, new_z, y

    start = (matrix, zero, zero, y, z, tree_zeros_like(y))
    matrix, _, beta, *_ = jax.lax.fori_loop(0, num_steps, step, start)
    finite = jnp.all(jnp.isfinite(matrix))
    square: Float[Array, "k k"] = jnp.where(finite, matrix, 0)[:-1, :-1]
    values, vectors = factorise(jnp.linalg.eigh, square)
    nan = jnp.where(finite, 0, jnp.nan)
    m = 1.05 * values[-1] + beta * jnp.abs(vectors[-1, -1]) + nan
    return values[0], 0.5 * values[0], m


def _normalised(y: PyTree[Array], precondition: Callable) -> tuple[PyTree, PyTree, Scalar]:
    z = precondition(y)
    size = jnp.sqrt(jnp.maximum(tree_dot(y, z), 0))
    inverse = 1 / jnp.where(size > 0, size, 1)
    return tree_scale(inverse, y), tree_scale(inverse, z), size
