"""The inverse Hessian that the inner L-BFGS leaves behind."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._inner._lbfgs_history import History
from .._problem import AbstractCondition
from .._tree import tree_all_finite, tree_scale, tree_where
from ._base import AbstractPreconditioner, Apply, no_products


class QuasiNewton(AbstractPreconditioner):
    """The pairs of the inner `bx.LBFGS`: `z = B r`, `B` its approximate inverse Hessian.

    The idea of SHINE, which takes `v = B b` for the solution. Here it is what CG begins
    with: its first step goes along `B b`, the next ones correct it, so that the answer is
    as right as that of any other preconditioner. The pairs are those of the last steps of
    the inner solve, which know of the Hessian at `x` what those steps have met.

    Needs `inner_solver=bx.LBFGS(...)`. It helps where the inner solve took many steps, and
    `history_length` is not much less than the number of eigenvalues that stand apart. After
    a warm start that took hardly any step there are hardly any pairs.

    **Cost:** no product; `4 history_length` vector operations a step of CG.

    **Exact when** never; symmetric and positive definite always.

    !!! example

        ```python
        import bilevax as bx

        inner_solver = bx.LBFGS(rtol=1e-6, history_length=30)
        rule = bx.Implicit(bx.linear.CG(), preconditioner=bx.precondition.QuasiNewton())
        ```

    Reference: Ramzi, Mannel, Bai, Starck, Ciuciu, Moreau, "SHINE: SHaring the INverse
    Estimate from the forward pass for bi-level optimization and implicit models", ICLR
    2022, section 2.
    """

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
        del matvec, condition, x, theta, state
        history = _find(inner_state)
        is_usable = tree_all_finite(history) & (history.length > 0)
        # A zero length and no pairs would be a zero matrix; the scale does not matter to CG.
        history = tree_where(is_usable, history, _identity(history))

        def apply(r: PyTree[Array]) -> PyTree[Array]:
            return tree_scale(-1.0, history.direction(r))

        return apply, None, no_products()


def _find(inner_state: PyTree) -> History:
    leaves = jtu.tree_leaves(inner_state, is_leaf=lambda a: isinstance(a, History))
    for leaf in leaves:
        if isinstance(leaf, History):
            return leaf
    raise TypeError(
        "QuasiNewton() needs inner_solver=bx.LBFGS(...), whose pairs it takes; the inner solver "
        f"given here hands out {type(inner_state).__name__}."
    )


def _identity(history: History) -> History:
    empty = jtu.tree_map(jnp.zeros_like, history)
    return eqx.tree_at(lambda h: h.length, empty, jnp.ones_like(history.length))
