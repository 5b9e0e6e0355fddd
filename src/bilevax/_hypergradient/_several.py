"""Hypergradients of several outer objectives of one inner problem."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._inner._asked import asked_of
from .._inner._base import Counts
from .._inner._default import as_inner_solver
from .._jit import lean_jit
from .._linear import LinearSolution
from .._problem import (
    Bilevel,
    as_arrays,
    bind,
    in_both_modes,
    restore,
    start_as_arrays,
    start_at,
)
from .._tree import map_rows, tree_sub
from ._base import Estimate, as_stats
from ._derivative import refuse_derivative
from ._entry import check_types, raise_failure
from ._locate import locating
from ._point import dual_value
from .implicit._adjoint import first_of_batch, reached, strictest
from .implicit._implicit import Implicit
from .implicit._rule import AbstractImplicit


def hypergradients(
    problem: Bilevel,
    x0: PyTree,
    theta: PyTree,
    *,
    inner_solver: Any = None,
    rule: Implicit | None = None,
    throw: bool = True,
) -> Estimate:
    """The hypergradients of several outer objectives, from one inner solve.

    `problem.outer` returns a vector of `m` values, or `(vector, aux)`. The `m` adjoint
    systems have one matrix: they are solved as a batch, so that products with it become
    matrix products.

    **Arguments:**

    - `problem`: a `Bilevel` whose `outer` returns a vector.
    - `x0`, `theta`, `inner_solver`, `throw`: as in `bx.hypergradient`.
    - `rule`: a `bx.Implicit` with the linear solver to use; with many objectives and few
        inner variables `bx.Implicit(bx.linear.Direct())` factorises once for all. Its evidence
        options are not available here.

    **Returns:** an `Estimate` in which `value`, `grad`, `v`, `adjoint_residual` and
    `dual_value` have a first axis of length `m`. `result` is the first failure of any.

    **Cost:** an inner solve, and as many steps of a batch of `m` Hessian products as the
    hardest system takes. `stats` counts single products.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - theta) ** 2 + x**2),
            outer=lambda x, theta: jnp.stack([jnp.sum(x**2), jnp.max(x)]),
        )
        bx.hypergradients(problem, jnp.zeros(3), jnp.ones(3)).grad  # of shape (2, 3)
        ```

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", 2016,
    eq. (2), for each objective.
    """
    rule = Implicit() if rule is None else rule
    check_types(problem, rule)
    if not (isinstance(rule, AbstractImplicit) and rule.is_plain):
        raise TypeError(
            f"`rule` must be a bx.Implicit without error_estimate and damping; got {rule!r}."
        )
    x0 = start_as_arrays(x0)
    args = problem, inner_solver, x0, as_arrays(theta)
    estimate = locating(partial(_hypergradients, *args[:2], rule, *args[2:]), *args)
    return raise_failure(estimate) if throw else estimate


@lean_jit
def _hypergradients(*args: Any) -> Estimate:
    reason = "take bx.hypergradient of each objective where it is to be differentiated"
    return refuse_derivative(_estimates, args, "bx.hypergradients", reason)


def _estimates(
    problem: Bilevel, inner_solver: Any, rule: AbstractImplicit, x0: PyTree, theta: PyTree
) -> Estimate:
    bound, start, theta = bind(problem, x0, theta)
    x0 = start_at(start, theta)
    condition = in_both_modes(bound.inner, x0, theta)
    _check_vector(bound, x0, theta)
    solver = as_inner_solver(inner_solver, condition, x0)
    inner, inner_state = solver.solve(condition, x0, theta, solver.init(condition, x0, theta))
    x = inner.x
    values, pullback, aux = jax.vjp(bound.outer_value, x, theta, has_aux=True)
    basis = jnp.eye(values.shape[0], dtype=values.dtype)
    grads_x, grads_theta = jax.vmap(pullback)(basis)
    at = condition.linearise(x, theta)
    end = reached(at.residual, x, x0, asked_of(solver, x))

    def solve(b: PyTree) -> LinearSolution:
        return rule.solve_adjoint(
            at.adjoint, b, condition, x, theta, inner_state, end=end, is_transposed=True
        )

    systems = map_rows(solve, grads_x, at.adjoint, x)
    grad = tree_sub(grads_theta, map_rows(lambda v: at.both(v)[1], systems.value))
    num = values.shape[0]
    counts = Counts(gradients=1, hessian=jnp.sum(systems.num_products), cross=num)
    evidence = {
        "adjoint_residual": systems.residual,
        "adjoint_tolerance": strictest(systems.tolerance),
        "dual_value": jax.vmap(dual_value, (0, 0, None))(values, systems.value, at.residual),
    }
    return Estimate.of(
        values,
        grad,
        rule.inner_result(inner.result),
        first_of_batch(systems),
        aux=aux,
        x=restore(condition, x, theta)[0],
        v=systems.value,
        inner_residual=inner.residual,
        inner_tolerance=inner.tolerance,
        stats=as_stats(inner.counts + counts, inner.num_steps, jnp.sum(systems.num_steps)),
        **evidence,
    )


def _check_vector(problem: Bilevel, x: PyTree, theta: PyTree) -> None:
    out, _ = eqx.filter_eval_shape(problem.outer_value, x, theta)
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) != 1 or shape[0] == 0:
        raise TypeError(
            "`outer` must return a vector of objectives here, or (vector, aux); got "
            f"{out if shape is None else f'an array of shape {shape}'}. For a scalar use "
            "bx.hypergradient."
        )
