"""Newton's method for equations: full steps at first, then none that lets the residual grow."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._linear import GMRES, Direct
from .._tree import tree_axpy, tree_dtype, tree_norm, tree_size, tree_sub, tree_where
from ._own_scale import compare, norm, own_magnitude

# Up to this size the singular values of the derivative are found in a second; they solve
# every system, and a singular one as well as can be.
_DENSE_SIZE = 512
# A step that has been halved so often leads nowhere.
_SHORTEST = 1e-12


class DampedNewton(optx.AbstractRootFinder):
    """`y <- y + t p` with `A p = -F(y)`, `A` the derivative of `F`.

    The first `full_steps` with `t = 1`. If they have not arrived, or have left the finite
    numbers, again from the start with `t` halved from one until the residual has fallen.
    Neither alone: full steps run away where the derivative is small, and a residual that
    must fall never leaves the valley of a local minimum, which full steps jump over.
    Stops when `||F|| <= atol + rtol ||A z||`, see `_own_scale.py`.

    Reference: Deuflhard, "Newton methods for nonlinear problems" (2011), section 3.1.
    """

    rtol: float | Scalar
    atol: float | Scalar
    norm: Callable[[PyTree], Scalar] = tree_norm  # Optimistix wants every solver to have one
    full_steps: int = eqx.field(default=0, static=True)

    def init(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> "_State":
        del fn, args, options, f_struct, aux_struct, tags
        one = jnp.ones((), tree_dtype(y))
        count = jnp.zeros((), jnp.int32)
        return _State(y, y, jnp.inf * one, one, count, jnp.zeros((), bool), optx.RESULTS.successful)

    def step(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        state: "_State",
        tags: frozenset[object],
    ) -> tuple[PyTree[Array], "_State", PyTree]:
        del options, tags
        at, (y0, last) = state.y_eval, (state.y0, state.residual)
        value, product, aux = jax.linearize(lambda y: fn(y, args), at, has_aux=True)
        residual = norm(value)
        is_full = state.num_full < self.full_steps
        is_less = residual <= (1 - 1e-4 * state.length) * last
        accept = jnp.isfinite(residual) & (is_less | is_full)

        def enough(scale: Scalar) -> Bool[Array, ""]:
            return residual <= self.atol + self.rtol * scale

        is_done = accept & enough(compare(value, product, own_magnitude(at, y0), enough).scale)
        b = jtu.tree_map(lambda f: jnp.where(accept & ~is_done, -f, 0), value)
        small = tree_size(y) <= _DENSE_SIZE
        solver = Direct(minimum_norm=True, is_symmetric=False) if small else GMRES(restart=50)
        direction = jax.lax.cond(
            accept & ~is_done, lambda: solver.solve(product, b).value, lambda: b
        )
        length = jnp.where(accept, 1.0, 0.5 * state.length).astype(last.dtype)
        shorter = tree_axpy(jnp.asarray(0.5, last.dtype), tree_sub(at, y), y)
        ahead = jtu.tree_map(jnp.add, at, direction)
        result = optx.RESULTS.where(
            length < _SHORTEST, optx.RESULTS.nonlinear_divergence, optx.RESULTS.successful
        )
        num_full = jnp.where(accept, state.num_full + 1, self.full_steps)
        is_again = is_full & (num_full >= self.full_steps) & ~is_done
        new_state = _State(
            y_eval=tree_where(is_again, y0, tree_where(accept, ahead, shorter)),
            y0=y0,
            residual=jnp.where(is_again, jnp.inf, jnp.where(accept, residual, last)),
            length=jnp.where(is_again, 1, length),
            num_full=num_full,
            is_done=is_done,
            result=result,
        )
        return tree_where(accept, at, y), new_state, aux

    def terminate(
        self,
        fn: Callable,
        y: PyTree[Array],
        args: PyTree,
        options: dict[str, Any],
        state: "_State",
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        del fn, y, args, options, tags
        return state.is_done, state.result

    def postprocess(
        self,
        fn: Callable,
        y: PyTree[Array],
        aux: PyTree,
        args: PyTree,
        options: dict[str, Any],
        state: "_State",
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[PyTree[Array], PyTree, dict[str, Any]]:
        del fn, args, options, state, tags, result
        return y, aux, {}


class _State(eqx.Module):
    y_eval: PyTree[Array]
    y0: PyTree[Array]
    residual: Scalar  # at the last accepted iterate
    length: Scalar  # of the step to `y_eval`, in Newton steps
    num_full: Int[Array, ""]  # steps taken at full length
    is_done: Bool[Array, ""]
    result: optx.RESULTS
