"""The second moment of the inner Adam as preconditioner."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Int, PyTree

from .._problem import AbstractCondition
from .._tree import largest_entry
from ._base import AbstractPreconditioner, Apply, no_products


class AdamState(AbstractPreconditioner):
    """The diagonal that the inner Adam divides by: `z = r / (sqrt(nu) + eps max sqrt(nu))`.

    `nu` is the mean of the squared gradients, of which Adam keeps one anyway. It is a size
    of the gradient and not of the curvature, but often large where that is large. The
    correction of its bias is a factor common to all entries, which CG does not see.

    Needs `inner_solver=bx.Descent(optax.adam(...), ...)`, or another optimiser that
    scales by Adam's moments.

    **Arguments:**

    - `eps`: relative to the largest entry, so that it means the same however small the
        gradients have become; it bounds the ratio of two scales by `1 / eps`.

    **Cost:** no product.

    **Exact when** never; symmetric and positive definite always.

    !!! example

        ```python
        import bilevax as bx, optax

        inner_solver = bx.Descent(optax.adam(1e-2), num_steps=1_000)
        rule = bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.AdamState(), inexact=True)
        ```

    Reference: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015,
    algorithm 1.
    """

    eps: float = 1e-3

    def __check_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"AdamState(eps=...) must be positive; got {self.eps}.")

    def init(self, x: PyTree[Array]) -> None:
        del x

    def prepare(
        self,
        matvec: Callable[[PyTree], PyTree],
        condition: AbstractCondition,
        x: PyTree[Array],
        theta: PyTree,
        inner_state: PyTree,
        state: None,
    ) -> tuple[Apply, None, Int[Array, ""]]:
        del matvec, condition, theta, state
        roots = jtu.tree_map(lambda a: jnp.sqrt(jnp.maximum(a, 0)), _find(inner_state, x))
        largest = largest_entry(roots)
        is_usable = (largest > 0) & jnp.isfinite(largest)
        largest = jnp.where(is_usable, largest, 1)

        def scale(root: Array) -> Array:
            relative = root / largest.astype(root.dtype) + jnp.asarray(self.eps, root.dtype)
            return jnp.where(is_usable, relative, 1)

        scales = jtu.tree_map(scale, roots)
        return lambda r: jtu.tree_map(jnp.divide, r, scales), None, no_products()


def _find(inner_state: PyTree, x: PyTree) -> PyTree[Array]:
    """The second moment, in the structure of `x`."""

    def is_adam(a: object) -> bool:
        return isinstance(a, optax.ScaleByAdamState)

    for leaf in jtu.tree_leaves(inner_state, is_leaf=is_adam):
        if is_adam(leaf) and jtu.tree_structure(leaf.nu) == jtu.tree_structure(x):
            return leaf.nu
    raise TypeError(
        "AdamState() needs inner_solver=bx.Descent(optax.adam(...), num_steps=...), one Adam for "
        "all variables; the inner solver given here hands out "
        f"{type(inner_state).__name__}."
    )
