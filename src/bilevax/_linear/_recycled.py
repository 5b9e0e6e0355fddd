"""A sequence of linear systems: the subspace that was hard is kept for the next one."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Int, PyTree

from .._checks import check_count
from .._tree import (
    tree_all_finite,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
)
from ._base import AbstractIterativeLinearSolver, LinearSolution
from ._cg import CG, _start, _State, _step, _System
from ._common import scaled_start
from ._deflation import Kept, deflate
from ._subspace import (
    append,
    empty_rows,
    put_row,
    smallest_ritz,
)


class Recycled(AbstractIterativeLinearSolver):
    """Conjugate gradients that learn from one system of a sequence for the next.

    The steps that CG takes are mostly spent on the eigenvectors of the smallest
    eigenvalues. They are collected while it runs, `W`, and taken out of the next system:
    there CG is preconditioned by

        P' M P + s W (W'A W)^{-1} W',    P = I - A W (W'A W)^{-1} W',

    `M` the other preconditioner, if any, which moves the eigenvalues that belong to `W`
    to `s`, inside the spectrum, and leaves the others alone. `W` is computed from the
    steps and their products with `A`, both of which CG has: every `rank` steps, the
    `rank` Ritz vectors of smallest Ritz value in the span of the last ones and the new
    steps.

    **Arguments:**

    - `solver`: `bx.linear.CG(...)`, whose tolerances, limits and outcomes hold.
    - `rank`: the number of vectors kept.

    **Returns** (from `resume`): a `LinearSolution` and the next state. `solve`, which has
    no state, is the plain `solver`. A `W` with `w'A w < 0` is proof that `A` is not
    positive definite: then the outcome is `negative_curvature`.

    **Cost:** one product a step and `rank` products for `A W` at every system but the
    first; `6 rank` vectors; about `30 rank` operations per entry of `v` and step. It pays
    where a few eigenvalues are much smaller than the rest and the systems change slowly;
    a spectrum without gaps gains nothing from the few vectors that fit.

    **Exact when** `A` is symmetric positive definite, whatever `W` is.

    !!! example

        ```python
        import jax.numpy as jnp
        import bilevax as bx

        A = jnp.diag(jnp.linspace(1.0, 100.0, 50).at[0].set(1e-3))
        b = jnp.ones(50)
        solver = bx.linear.Recycled(bx.linear.CG(rtol=1e-4), rank=3)
        state = solver.start(b)
        for _ in range(3):
            solution, state = solver.resume(lambda v: A @ v, b, None, None, state)
            print(solution.num_steps)
        ```

    Reference: Stathopoulos and Orginos, "Computing and deflating eigenvalues while solving
    multiple right-hand side linear systems", SIAM J. Sci. Comput. 32 (2010), section 2;
    the preconditioner: Tang, Nabben, Vuik, Erlangga, J. Sci. Comput. 39 (2009), BNN.
    """

    needs: ClassVar[str] = "symmetric positive definite"

    solver: CG
    rank: int

    def __init__(self, solver: lx.AbstractLinearSolver | None = None, rank: int = 10) -> None:
        solver = CG() if solver is None else solver
        if not isinstance(solver, CG):
            raise TypeError(f"Recycled(solver=...) must be bx.linear.CG(...); got {solver!r}.")
        check_count("Recycled", required=True, rank=rank)
        self.solver = solver
        self.rank = rank

    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        return self.solver.solve(matvec, b, v0, preconditioner)

    def start(self, b: PyTree[Array]) -> PyTree:
        return Kept(empty_rows(b, self.rank), jnp.zeros((), bool))

    def resume(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None,
        preconditioner: Callable[[PyTree], PyTree] | None,
        state: "Kept",
    ) -> tuple[LinearSolution, "Kept"]:
        if not jtu.tree_leaves(b):
            return self.solve(matvec, b, v0, preconditioner), state
        deflation = deflate(matvec, preconditioner, state)
        # 1. the solve, from the best start in the span of W
        scale, b, v, r, num_products = scaled_start(matvec, b, v0)
        v, r = deflation.improve(v, r)
        norm_b = tree_norm(b)
        tolerance, limit = self.solver._stopping_rule(b, norm_b, scale)
        measures = self.solver.num_steps is None
        system = _System(matvec, b, deflation.apply, tolerance, measures)
        run = jax.lax.while_loop(
            lambda s: s.cg.is_running & ((s.cg.num_steps < limit) | s.cg.refresh),
            lambda s: _step_and_collect(s, system, self.rank),
            _Run(
                _start(system, v, r, num_products),
                append(deflation.W, empty_rows(b, self.rank)),
                append(deflation.AW, empty_rows(b, self.rank)),
                jnp.asarray(0, jnp.int32),
            ),
        )
        solution = self.solver._finish(run.cg, scale, norm_b, tolerance)
        # 2. what is kept for the next one
        W, _ = smallest_ritz(run.basis, run.products, self.rank)
        is_better = tree_all_finite(W) & (tree_dot(W, W) > 0)
        state = Kept(tree_where(is_better, W, state.W), state.is_filled | is_better)
        return deflation.judge(solution), state


class _Run(eqx.Module):
    cg: _State
    # the Ritz vectors so far, then the steps since; both times A, and the number of steps
    basis: PyTree[Array]
    products: PyTree[Array]
    num_new: Int[Array, ""]


def _step_and_collect(s: _Run, system: _System, rank: int) -> _Run:
    cg = _step(s.cg, system)
    # A step and its product with A are differences of iterates and of residuals.
    moved = cg.num_steps > s.cg.num_steps
    step, product = tree_sub(cg.v, s.cg.v), tree_sub(s.cg.r, cg.r)
    # Of norm one: steps shrink by orders of magnitude, squares underflow.
    norm = tree_norm(step)
    inverse = jnp.where(moved & (norm > 0), 1 / jnp.where(norm > 0, norm, 1), 0)
    slot = rank + s.num_new
    basis = put_row(s.basis, tree_scale(inverse, step), slot)
    products = put_row(s.products, tree_scale(inverse, product), slot)
    num_new = s.num_new + moved.astype(jnp.int32)

    def compress() -> tuple[PyTree, PyTree, Array]:
        rows = smallest_ritz(basis, products, rank)
        empty = empty_rows(step, rank)
        return append(rows[0], empty), append(rows[1], empty), jnp.zeros_like(num_new)

    kept = jax.lax.cond(num_new == rank, compress, lambda: (basis, products, num_new))
    return _Run(cg, *kept)
