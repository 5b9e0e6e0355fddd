"""Limited-memory BFGS, stopping on the gradient."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._tree import (
    default_rtol,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_larger,
    tree_norm,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from ._line_search import is_decrease, is_level, is_lost, rounding, shrink

# So many steps without a smaller gradient, where the objective no longer changes, is the
# precision floor: on the way down the gradient of L-BFGS rises for a few steps at a time.
_PATIENCE = 30


class LBFGS(optx.AbstractMinimiser):
    """Limited-memory BFGS."""

    rtol: float | None = None
    atol: float = 0.0
    history_length: int = 10

    def __check_init__(self) -> None:
        if self.history_length < 1:
            raise ValueError(
                f"`LBFGS(history_length=...)` must be at least 1; got {self.history_length}."
            )

    @property
    def norm(self) -> Callable[[PyTree], Scalar]:
        return tree_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return _State(
            y_eval=y,
            y0=y,
            aux=jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), aux_struct),
            gradient=tree_zeros_like(y),
            history=_History.empty(y, self.history_length),
            search=_Search.empty(tree_dtype(y)),
            num_gradients=jnp.array(0, jnp.int32),
            num_hessian_products=jnp.array(0, jnp.int32),
            is_done=jnp.array(False),
            result=optx.RESULTS.successful,
        )

    def step(self, fn, y, args, options, state, tags):
        rtol = default_rtol(y) if self.rtol is None else self.rtol
        s, is_first = state.search, state.num_gradients == 0
        # 1. the objective and its gradient at the candidate
        evaluate = jax.value_and_grad(lambda y: fn(y, args), has_aux=True)
        (f, aux), gradient = evaluate(state.y_eval)
        f, residual = f.astype(s.f.dtype), tree_norm(jax.lax.stop_gradient(gradient))

        # 2. accept or reject it
        moved = tree_sub(state.y_eval, y)
        new_slope = tree_dot(gradient, moved)
        is_finite = jnp.isfinite(f) & jnp.isfinite(residual)
        is_good = is_decrease(s.f, f, s.slope) | (is_level(s.f, f) & (new_slope <= -0.9 * s.slope))
        accept = is_finite & (is_first | is_good)
        factor = shrink(s.slope, new_slope)
        new_y = tree_where(accept, state.y_eval, y)
        best = jnp.minimum(residual, s.best)
        idle = accept & (residual >= s.best) & (-s.slope <= rounding(s.f))
        num_idle = jnp.where(idle, s.num_idle + 1, jnp.where(accept, 0, s.num_idle))
        stuck = (num_idle >= _PATIENCE) | (~accept & is_lost(s.f, factor * s.slope, s.full_slope))
        stuck = stuck | (is_first & ~is_finite)

        # 3. converged? The scale costs a Hessian product: only where it may matter
        now = jnp.where(accept, residual, s.residual)
        near = accept & (now <= self.atol + rtol * s.scale)
        measured = is_first | near | stuck
        z = tree_larger(new_y, state.y0)
        product = jax.lax.cond(
            measured,
            lambda: jax.jvp(lambda y: evaluate(y)[1], (new_y,), (z,))[1],
            lambda: tree_zeros_like(z),
        )
        scale = jnp.where(measured, tree_norm(product), s.scale)
        is_done = (accept | stuck) & measured & (now <= self.atol + rtol * scale)

        # 4. the next direction
        change = tree_sub(gradient, state.gradient)
        history = state.history.add(moved, change, accept & ~is_first)
        guess = _first_length(tree_norm(z), scale, residual)
        length = jnp.where(is_first, guess, history.length)
        history = eqx.tree_at(lambda h: h.length, history, length)
        grad = tree_where(accept, gradient, state.gradient)
        direction = history.direction(grad)
        slope = tree_dot(grad, direction)
        uphill = ~(slope < 0)
        direction = jtu.tree_map(lambda p, g: jnp.where(uphill, -length * g, p), direction, grad)
        slope = jnp.where(uphill, -length * residual**2, slope)

        # 5. the next candidate
        y_eval = tree_where(
            accept,
            jtu.tree_map(lambda a, p: jnp.where(is_done, a, a + p), state.y_eval, direction),
            tree_axpy(factor, moved, y),
        )
        failure = optx.RESULTS.where(is_finite, optx.RESULTS.stagnation, optx.RESULTS.nonfinite)
        result = optx.RESULTS.where(stuck & ~is_done, failure, optx.RESULTS.successful)

        def new(a, b):
            return jnp.where(accept, a, b)

        search = _Search(
            f=new(f, s.f),
            residual=now,
            scale=jnp.where(is_first, scale + residual, scale),
            slope=new(slope, factor * s.slope),
            full_slope=new(slope, s.full_slope),
            best=new(best, s.best),
            num_idle=num_idle,
        )
        state = _State(
            y_eval=y_eval,
            y0=state.y0,
            aux=tree_where(accept, aux, state.aux),
            gradient=grad,
            history=history,
            search=search,
            num_gradients=state.num_gradients + 1,
            num_hessian_products=state.num_hessian_products + measured,
            is_done=is_done,
            result=result,
        )
        return new_y, state, state.aux

    def terminate(self, fn, y, args, options, state, tags):
        return state.is_done, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        rtol = default_rtol(y) if self.rtol is None else self.rtol
        stats = {
            "residual": state.search.residual,
            "tolerance": self.atol + rtol * state.search.scale,
            "num_gradients": state.num_gradients,
            "num_hessian_products": state.num_hessian_products,
        }
        return y, state.aux, stats


def _first_length(norm_z, scale, residual):
    """A first step length: the inverse curvature along z, or a step of length one."""
    known = (norm_z > 0) & (scale > 0)
    inverse_curvature = norm_z / jnp.where(known, scale, 1)
    return jnp.where(known, inverse_curvature, 1 / jnp.where(residual > 0, residual, 1))


class _Search(eqx.Module):
    f: Scalar
    residual: Scalar
    scale: Scalar
    slope: Scalar
    full_slope: Scalar
    best: Scalar
    num_idle: Int[Array, ""]

    @classmethod
    def empty(cls, dtype):
        inf, zero = jnp.array(jnp.inf, dtype), jnp.array(0, dtype)
        return cls(inf, inf, zero, -inf, -inf, inf, jnp.array(0, jnp.int32))


class _History(eqx.Module):
    """The last pairs `s`, `y` of changes of position and gradient, in a ring.

    With `S`, `Y` the pairs as rows, `R` the upper triangle (in order of age) of `S Y'`
    and `D` its diagonal, the approximate inverse Hessian is (Byrd, Nocedal and Schnabel
    1994, equation (3.1))

        gamma I + [S' gamma Y'] [R^-T (D + gamma Y Y') R^-1,  -R^-T] [S      ]
                                [-R^-1,                       0    ] [gamma Y]

    `R^-1` itself is kept: dropping the oldest pair deletes a row and a column of it, and
    a new one adds a column. Nothing is solved, nothing is shifted, and an empty row is
    zero everywhere.
    """

    steps: PyTree[Array]
    changes: PyTree[Array]
    inverse: Array
    gram: Array
    diagonal: Array
    length: Scalar
    index: Int[Array, ""]

    @classmethod
    def empty(cls, y, m):
        dtype = tree_dtype(y)
        rows = jtu.tree_map(lambda x: jnp.zeros((m, *x.shape), x.dtype), y)
        square = jnp.zeros((m, m), dtype)
        return cls(
            rows,
            rows,
            square,
            square,
            jnp.zeros(m, dtype),
            jnp.ones((), dtype),
            jnp.array(0, jnp.int32),
        )

    def add(self, step, change, is_new):
        curvature, change_sq = tree_dot(step, change), tree_dot(change, change)
        step_sq = tree_dot(step, step)
        eps = jnp.finfo(curvature.dtype).eps
        is_new = is_new & (curvature > eps * jnp.sqrt(change_sq * step_sq))
        safe = jnp.where(is_new, curvature, 1)
        k = self.index
        row = jnp.arange(self.diagonal.size) == k

        def put(rows, x):
            old = jax.lax.dynamic_index_in_dim(rows, k, 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(is_new, x, old), k, 0)

        steps = jtu.tree_map(put, self.steps, step)
        changes = jtu.tree_map(put, self.changes, change)
        without = jnp.where(row[:, None] | row[None, :], 0, self.inverse)
        column = jnp.where(row, 1, -(without @ _rows_dot(steps, change))) / safe
        inverse = jnp.where(row[None, :], column[:, None], without)
        new_gram = _rows_dot(changes, change)
        gram = jnp.where(row[None, :], new_gram[:, None], self.gram)
        gram = jnp.where(row[:, None], new_gram[None, :], gram)
        diagonal = jnp.where(row, curvature, self.diagonal)
        length = curvature / jnp.where(is_new, change_sq, 1)
        pick = lambda a, b: jnp.where(is_new, a, b)
        return _History(
            steps,
            changes,
            pick(inverse, self.inverse),
            pick(gram, self.gram),
            pick(diagonal, self.diagonal),
            pick(length, self.length),
            jnp.where(is_new, (k + 1) % self.diagonal.size, k),
        )

    def direction(self, gradient):
        u = self.inverse @ _rows_dot(self.steps, gradient)
        w = self.diagonal * u + self.length * (self.gram @ u - _rows_dot(self.changes, gradient))
        w = w @ self.inverse
        return jtu.tree_map(
            lambda g, s, y: (
                -self.length * g - jnp.tensordot(w, s, 1) + self.length * jnp.tensordot(u, y, 1)
            ),
            gradient,
            self.steps,
            self.changes,
        )


def _rows_dot(rows, x):
    products = [
        jnp.tensordot(a, b, b.ndim) for a, b in zip(jtu.tree_leaves(rows), jtu.tree_leaves(x))
    ]
    return sum(products[1:], products[0])


class _State(eqx.Module):
    y_eval: PyTree
    y0: PyTree
    aux: PyTree
    gradient: PyTree
    history: _History
    search: _Search
    num_gradients: Any
    num_hessian_products: Any
    is_done: Any
    result: optx.RESULTS
