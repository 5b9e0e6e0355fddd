"""A limit in bytes for what unrolling keeps, and what a loop would need."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Var
from jaxtyping import Array, PyTree

from ._explicit import ExplicitStep, State, explicit_step

# The carry, its adjoint and the copy that a loop makes of each.
_CARRIES_IN_USE = 4


class MemoryBudget(eqx.Module):
    """The memory that `bx.Unrolled` may use; it picks the fastest policy that fits.

    With S the size of a carry (`x` and the optimiser's state) and W what one step back
    needs (measured from the compiled step), `num_bytes - W - 4 S` is left for kept carries.
    All of them if they fit, the square root rule if that fits, otherwise as many as there
    is room for, with the fewest steps taken again (`Unrolled(checkpoints=...)`).

    **Arguments:**

    - `num_bytes`: the working memory of the unrolled loop, in bytes, an integer. What the caller
        holds (data, theta, its gradient) is not in it.

    A budget without room for a single carry is a `ValueError` that names what is needed.

    **Cost:** the compilation of one step back, to measure W.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.Unrolled(checkpoints=bx.MemoryBudget(50_000_000))
        ```
    """

    num_bytes: int

    def __check_init__(self) -> None:
        if isinstance(self.num_bytes, bool) or not isinstance(self.num_bytes, int):
            raise TypeError(f"MemoryBudget(num_bytes) must be an integer; got {self.num_bytes!r}.")
        if self.num_bytes < 1:
            raise ValueError(f"MemoryBudget(num_bytes) must be positive; got {self.num_bytes!r}.")

    def policy(
        self, step: Callable[[PyTree], PyTree], carry: PyTree[Array], length: int
    ) -> Literal["all", "sqrt"] | int:
        """What `repeat` is to do with `length` steps."""
        num_carries = self.num_carries(step, carry)
        if num_carries >= length:
            return "all"
        return "sqrt" if num_carries >= 4 * length**0.5 else num_carries

    def num_carries(self, step: Callable[[PyTree], PyTree], carry: PyTree[Array]) -> int:
        """How many carries may be kept."""
        size = max(num_bytes(carry), 1)
        fixed = _workspace(explicit_step(step, carry)) + _CARRIES_IN_USE * size
        num_carries = (self.num_bytes - fixed) // size
        if num_carries < 1:
            raise ValueError(
                f"MemoryBudget({self.num_bytes:,}) has no room for a single carry of the inner "
                f"solver: the loop needs at least {fixed + size:,} bytes, {size:,} for each "
                "carry. Give more, or use bx.Implicit(), which keeps none."
            )
        return num_carries


def num_bytes(tree: PyTree[Array]) -> int:
    """The memory of the arrays in `tree`."""
    return sum(_bytes(leaf) for leaf in jtu.tree_leaves(tree))


def residual_bytes(step: Callable[[PyTree], PyTree], carry: PyTree[Array]) -> int:
    """What the way back through one step needs to know, if the step is not taken again.

    What does not change from step to step (data, theta) is not counted.
    """
    explicit = explicit_step(step, carry)

    def residuals(state: State, varying: PyTree, fixed: PyTree) -> list:
        transpose = _transpose(explicit, varying, fixed, state)
        return [leaf for leaf in jtu.tree_leaves(transpose) if eqx.is_array(leaf)]

    traced: Any = jax.make_jaxpr(residuals)(explicit.state, explicit.varying, explicit.fixed)
    num_carried = len(jtu.tree_leaves(explicit.state))
    invariant = {*traced.jaxpr.invars[num_carried:], *traced.jaxpr.constvars}
    kept = {v for v in traced.jaxpr.outvars if isinstance(v, Var)} - invariant
    return sum(_bytes(v.aval) for v in kept)


def _bytes(array: Any) -> int:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return 8 * array.size
    return array.size * array.dtype.itemsize


def _transpose(
    explicit: ExplicitStep, varying: PyTree, fixed: PyTree, state: State
) -> Callable[[PyTree], PyTree]:
    """The transposed derivative of a step, in all that it depends on."""
    carry, rest = state
    return jax.vjp(lambda v, c: explicit.apply(v, fixed, (c, rest)), varying, carry, has_aux=True)[
        1
    ]


def _workspace(explicit: ExplicitStep) -> int:
    """The working memory of one step back, the gradient it adds to included."""

    def pull_back(varying: PyTree, fixed: PyTree, state: State, adjoint: PyTree) -> PyTree:
        return _transpose(explicit, varying, fixed, state)(adjoint)

    arguments = (explicit.varying, explicit.fixed, explicit.state, explicit.state[0])
    shapes = jtu.tree_map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    analysis = jax.jit(pull_back).lower(*shapes).compile().memory_analysis()
    # a backend may not say
    return 0 if analysis is None else analysis.temp_size_in_bytes
