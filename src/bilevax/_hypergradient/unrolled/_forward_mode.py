"""Forward mode: the exact derivative of the steps, carried along with them."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._checks import check_positive
from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver, Counts, run
from ..._problem import AbstractCondition, start_at
from ..._raise import or_fail
from ..._tree import (
    flat_to_tree,
    is_symbolic,
    stop_gradient,
    tree_basis,
    tree_size,
)
from .._base import (
    AbstractHypergradient,
    Estimate,
    HypergradientState,
    Query,
    as_stats,
    finite_or_not,
)
from .._call import Call
from .._derivative import refuse_backward, unmoved
from ._agreement import convergence, judged
from ._watched import Steps, residual_of, watched, watched_call


class ForwardMode(AbstractHypergradient):
    """As `Unrolled`, by forward mode: for few outer variables.

        L_K(theta) = L(x_K(theta), theta),    x_{k+1} = step(x_k, theta),  x_0 = x0(theta)
        Z_{k+1} = d_x step Z_k + d_theta step,    grad = d_theta L + Z_K^T d_x L

    One column of Z for every entry of theta. Nothing is stored on the way, so that the
    number of steps may be anything and need not be known: line searches, linear solves and
    solvers that stop by themselves are differentiated as they are. (A stopping test itself
    has no derivative.)

    **Arguments:**

    - `num_steps`: at most this many inner steps; by default what the inner solver says.
    - `batch_size`: at most this many columns at a time; by default all. Each batch repeats
        the steps.

    What is differentiated: theta, also where the optimiser's own parameters or `x0` are
    functions of it.

    Through `bx.argmin` and as an adjoint of Optimistix both jvp and vjp form all columns
    of what is being differentiated, and jvps may be nested; a vjp of a derivative is
    refused by JAX.

    **Cost:** one run of the steps, and 1.3 more for every entry of theta. Memory of as many
    copies of `x` and the optimiser's state. Cheaper than reverse mode for up to three
    entries, still bearable for thirty.

    **Exact when** `L_K` is the problem you mean, as `Unrolled`, and in the same digits.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.ForwardMode()
        ```

    Reference: Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based
    hyperparameter optimization", 2017, section 3.2.
    """

    needs_steps: ClassVar[bool] = True

    num_steps: int | None = None
    batch_size: int | None = None

    def __check_init__(self) -> None:
        if self.num_steps is not None:
            check_positive(self.num_steps, "num_steps")
        if self.batch_size is not None:
            check_positive(self.batch_size, "batch_size")

    @property
    def differentiates_start(self) -> bool:
        return True

    def init(self, query: Query) -> HypergradientState:
        _check_stepping(query.inner_solver)
        return HypergradientState(x=query.start, v=None, inner=query.inner_state)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        problem, inner_solver, x0, theta = query
        condition, solver = problem.inner, _check_stepping(inner_solver)

        def truncated_problem(theta: PyTree) -> tuple[Array, tuple]:
            x, inner_state, count = self._run(condition, solver, x0, theta, state.inner)
            value, aux = problem.outer_value(x, theta)
            return value, (aux, x, inner_state, count)

        value, slopes, (aux, x, inner_state, count) = self._columns(truncated_problem, theta)
        grad = jtu.tree_map(lambda g, t: g.astype(t.dtype), flat_to_tree(slopes, theta), theta)
        at = convergence(condition, solver, x, start_at(x0, theta), theta, count)
        products = count * tree_size(theta)
        stats = as_stats(Counts(count + 2, products, products), count, 0)
        found = judged(problem, x, theta, grad, at)
        results = (finite_or_not((value, grad)), found.result)
        estimate = Estimate.of(value, grad, *results, aux=aux, x=x, stats=stats, **found.evidence)
        return estimate, HypergradientState(x=x, v=None, inner=inner_state)

    def differentiable_estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        out = self.estimate(query, unmoved(state, "ForwardMode"))
        return refuse_backward(out, "ForwardMode", "its loops run forward only")

    def solution(self, query: Query, throw: bool) -> PyTree[Array]:
        _check_stepping(query.inner_solver)

        def solve(args: tuple) -> tuple[PyTree, None]:
            (condition, x0, theta), solver = args
            state = solver.init(condition, start_at(x0, theta), theta)
            return self._run(condition, solver, x0, theta, state)[0], None

        def run(args: tuple) -> tuple[PyTree, None]:
            return self._attach(solve, (args, query.inner_solver))

        condition = query.condition
        steps = Steps(run, residual_of, condition.is_symmetric, query.inner_solver)
        x, _ = watched(steps, (condition, query.x0, query.theta), query.start, throw)
        return or_fail(x, finite_or_not(x), throw)

    def attach_to_call(self, call: Call) -> tuple[PyTree[Array], PyTree]:
        call = call.at_most(self.num_steps)
        return watched_call(call, partial(self._attach, call.run))

    def _run(
        self,
        condition: AbstractCondition,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, Array]:
        """x, the solver's state for the next solve, and the number of steps."""
        carry = solver.start(condition, start_at(x0, theta), theta, stop_gradient(state))
        carry, count = run(solver, condition, theta, carry, self.num_steps)
        return *solver.finish(condition, carry), count

    def _columns(self, fn: Callable, args: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """`fn(args)`, its derivative in each entry of `args`, and what it returns beside."""

        def column(direction: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            return jax.jvp(fn, (args,), (direction,), has_aux=True)

        basis = tree_basis(args)
        if self.batch_size is None and tree_size(args) > 0:
            # The steps themselves do not depend on the direction: they are taken once.
            return jax.vmap(column, out_axes=(None, 0, None))(basis)
        value, rest = fn(args)
        if tree_size(args) == 0:
            return value, jtu.tree_map(lambda a: jnp.zeros((0, *a.shape), a.dtype), value), rest
        slopes = jax.lax.map(lambda d: column(d)[1], basis, batch_size=self.batch_size)
        return value, slopes, rest

    def _attach(self, fn: Callable, args: PyTree) -> tuple[PyTree, PyTree]:
        """`fn(args)`, which is `(x, rest)`; `x` is differentiable in what moves in `args`.

        `fn` must not close over arrays: its derivative is taken when they are gone.
        """
        inexact, fixed = eqx.partition(args, eqx.is_inexact_array)
        arrays, static = eqx.partition(fixed, eqx.is_array)
        x, rest = stop_gradient(fn(stop_gradient(args)))

        @jax.custom_jvp
        def attached(inexact: PyTree, arrays: PyTree, x: PyTree) -> PyTree:
            del inexact, arrays
            return x

        def attached_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
            inexact, arrays, _ = primals
            leaves, structure = jtu.tree_flatten(inexact)
            dots = jtu.tree_leaves(tangents[0], is_leaf=is_symbolic)
            moving = [k for k, dot in enumerate(dots) if not is_symbolic(dot)]

            def of_moving(moved: list[Array]) -> tuple[PyTree, None]:
                all_leaves = list(leaves)
                for k, leaf in zip(moving, moved, strict=True):
                    all_leaves[k] = leaf
                inexact = jtu.tree_unflatten(structure, all_leaves)
                return fn(eqx.combine(inexact, arrays, static))[0], None

            x, columns, _ = self._columns(of_moving, [leaves[k] for k in moving])
            return x, _combination(columns, [dots[k] for k in moving])

        attached.defjvp(attached_jvp, symbolic_zeros=True)
        return attached(inexact, arrays, x), rest


def _combination(columns: PyTree, dots: list[Array]) -> PyTree:
    """The sum of the columns, weighted by the entries of `dots`."""

    def combine(column: Array) -> Array:
        weights = [dot.reshape(-1).astype(column.dtype) for dot in dots]
        if not weights:
            return jnp.zeros(column.shape[1:], column.dtype)
        return jnp.tensordot(jnp.concatenate(weights), column, axes=1)

    return jtu.tree_map(combine, columns)


def _check_stepping(inner_solver: AbstractInnerSolver) -> AbstractSteppingSolver:
    if not isinstance(inner_solver, AbstractSteppingSolver):
        raise TypeError(
            "`ForwardMode` differentiates the steps of the inner solver, and "
            f"{type(inner_solver).__name__} has none that JAX can see. Use bx.Implicit(), or an "
            "inner solver such as bx.Descent(optimizer, num_steps=...)."
        )
    return inner_solver
