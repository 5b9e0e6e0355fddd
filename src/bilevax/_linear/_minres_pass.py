"""One Lanczos process of MINRES: short recurrences, and when to stop believing them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._tree import tree_axpy, tree_dot, tree_norm, tree_scale, tree_where, tree_zeros_like

# Eigenvalues within this many rounding errors of zero, relative to the norm of A, are zero.
# With 10 one in ten singular systems of 200 variables was not recognised, with 100 none.
_ROUNDING = 100.0


class System(NamedTuple):
    matvec: Callable[[PyTree], PyTree]
    preconditioner: Callable[[PyTree], PyTree] | None
    target: Scalar  # of the two-norm of the residual
    limit: int  # of all steps
    indefinite: bool

    def precondition(self, r: PyTree[Array]) -> PyTree[Array]:
        return r if self.preconditioner is None else self.preconditioner(r)

    def norm(self, r: PyTree[Array]) -> Scalar:
        """In the geometry of the preconditioner, which may turn out not to be definite."""
        return jnp.sqrt(jnp.abs(tree_dot(r, self.precondition(r))))


class Pass(NamedTuple):
    """What one process found; `floor` is the eigenvalue that counts as zero.

    `is_null`: `A r` is zero as far as the recurrences know; `is_negative`: there is a
    negative eigenvalue; `is_broken`: the recurrences have lost their orthogonality.
    """

    v: PyTree[Array]
    norm: Scalar
    floor: Scalar
    num_steps: Int[Array, ""]
    is_null: Bool[Array, ""]
    is_negative: Bool[Array, ""]
    is_broken: Bool[Array, ""]
    is_finite: Bool[Array, ""]


class _State(NamedTuple):
    # iterate and residual
    v: PyTree[Array]
    r: PyTree[Array]
    # Lanczos: y and z = P y of this step, y of the one before, beta between them
    y: PyTree[Array]
    z: PyTree[Array]
    old_y: PyTree[Array]
    beta: Scalar
    norm: Scalar  # of A, from below
    pivot: Scalar  # of the LDL' factors of the shifted Lanczos matrix
    # the last two directions, their products, and the last two rotations
    w: tuple[PyTree[Array], PyTree[Array]]
    u: tuple[PyTree[Array], PyTree[Array]]
    cos: tuple[Scalar, Scalar]
    sin: tuple[Scalar, Scalar]
    # the last step: its length, and its length times the diagonal of R
    alpha: Scalar
    alpha_diagonal: Scalar
    # outcome
    num_steps: Int[Array, ""]
    is_running: Bool[Array, ""]
    is_null: Bool[Array, ""]
    is_negative: Bool[Array, ""]
    is_broken: Bool[Array, ""]
    is_finite: Bool[Array, ""]


def run_pass(
    system: System,
    v: PyTree[Array],
    r: PyTree[Array],
    start: PyTree[Array],
    norm: Scalar,
    num_steps: Int[Array, ""],
) -> Pass:
    """Minimise the residual `r` of `v` over the Krylov space that begins with `start`.

    Notation: `P` the preconditioner, `z = P y`, the vectors `y` orthonormal in the product
    `y'P y`, and `A Z_k = Y_{k+1} T_k`. The directions `W_k = Z_k R_k^{-1}`, `T_k = Q_k R_k`,
    have products `U_k = A W_k` that are orthonormal in the same sense, so that a step is
    `alpha = u'P r`. `A r` is orthogonal to all but the next two vectors of the basis, which
    gives its norm, one step late.
    """
    z = system.precondition(start)
    size = jnp.sqrt(jnp.maximum(tree_dot(start, z), 0))
    safe = jnp.where(size > 0, size, 1)
    zero, zeros = jnp.zeros_like(size), tree_zeros_like(r)
    one, false = jnp.ones_like(size), jnp.zeros((), bool)
    first = _State(
        *(v, r, tree_scale(1 / safe, start), tree_scale(1 / safe, z), zeros),
        *(zero, norm, one, (zeros, zeros), (zeros, zeros), (one, one), (zero, zero)),
        *(zero, jnp.full_like(size, jnp.inf), num_steps),
        is_running=(size > 0) & (num_steps < system.limit) & (tree_norm(r) > system.target),
        is_null=false,
        is_negative=false,
        is_broken=false,
        is_finite=jnp.isfinite(size),
    )
    end = jax.lax.while_loop(lambda s: s.is_running, lambda s: _step(s, system), first)
    outcome = (end.is_null, end.is_negative, end.is_broken, end.is_finite)
    return Pass(end.v, end.norm, _floor(end.norm), end.num_steps, *outcome)


def _floor(norm: Scalar) -> Scalar:
    return _ROUNDING * float(jnp.finfo(norm.dtype).eps) * norm


def _step(s: _State, system: System) -> _State:
    eps = float(jnp.finfo(s.norm.dtype).eps)
    # 1. Lanczos
    q = system.matvec(s.z)
    delta = tree_dot(s.z, q)
    y = jtu.tree_map(lambda q, y, old: q - delta * y - s.beta * old, q, s.y, s.old_y)
    z = system.precondition(y)
    beta = jnp.sqrt(jnp.maximum(tree_dot(y, z), 0))
    norm = jnp.maximum(s.norm, jnp.sqrt(delta**2 + beta**2 + s.beta**2))

    # 2. a negative pivot is an eigenvalue of the Lanczos matrix below minus the shift
    pivot = delta + _floor(norm) - s.beta**2 / s.pivot
    is_negative = (pivot < 0) & (not system.indefinite)

    # 3. the next column of R, and its direction
    (old_cos, cos), (old_sin, sin) = s.cos, s.sin
    bar = cos * delta - old_cos * sin * s.beta
    diagonal = jnp.sqrt(bar**2 + beta**2)
    above, top = sin * delta + old_cos * cos * s.beta, old_sin * s.beta
    is_step = ~is_negative & (diagonal > 10 * eps * norm)  # false also for NaN
    safe = jnp.where(is_step, diagonal, 1)

    def direction(x: PyTree, before: tuple[PyTree, PyTree]) -> PyTree:
        return jtu.tree_map(lambda x, a, b: (x - top * a - above * b) / safe, x, *before)

    w, u = direction(s.z, s.w), direction(q, s.u)
    Pu = system.precondition(u)
    uu = tree_dot(u, Pu)
    is_step = is_step & (uu > 0) & jnp.isfinite(uu)

    # 4. step
    alpha = jnp.where(is_step, tree_dot(s.r, Pu) / jnp.where(is_step, uu, 1), 0)
    r = tree_where(is_step, tree_axpy(-alpha, u, s.r), s.r)
    size = tree_norm(r)
    v = tree_where(is_step, tree_axpy(alpha, w, s.v), s.v)
    norm_Ar = jnp.hypot(s.alpha_diagonal, alpha * diagonal + s.alpha * above)

    # 5. Past convergence the recurrences lose the directions: their norm is one, or nothing.
    is_broken = is_step & (jnp.abs(uu - 1) > jnp.sqrt(eps))
    is_null = is_step & (norm_Ar <= _floor(norm) * system.norm(r))
    num_steps = s.num_steps + is_step.astype(jnp.int32)
    goes_on = is_step & ~is_broken & ~is_null & (size > system.target) & (beta > 10 * eps * norm)
    safe_beta = jnp.where(beta > 0, beta, 1)
    return _State(
        *(v, r, tree_scale(1 / safe_beta, y), tree_scale(1 / safe_beta, z), s.y),
        *(beta, norm, pivot, (s.w[1], w), (s.u[1], u)),
        (cos, bar / safe),
        (sin, beta / safe),
        *(alpha, alpha * diagonal, num_steps),
        is_running=goes_on & (num_steps < system.limit),
        is_null=is_null,
        is_negative=is_negative,
        is_broken=is_broken,
        is_finite=jnp.isfinite(delta) & jnp.isfinite(beta),
    )
