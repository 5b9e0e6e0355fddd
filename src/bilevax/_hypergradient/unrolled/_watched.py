"""The derivative of steps inside another program: it fails where it is not that of x.

An estimate carries its evidence; a derivative that JAX takes of a solution map, or of a call of
Optimistix, does not. So what goes into the steps, and what comes out of them, passes through
the identity, which looks at what JAX sends through it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from ..._inner._asked import asked_of
from ..._problem import Root
from ..._raise import or_fail
from ..._results import RESULTS
from ..._tree import (
    is_symbolic,
    stop_gradient,
    tangent_or_zero,
    tree_all_finite,
    tree_axpy,
    tree_norm,
    tree_sub,
    tree_zeros_like,
    where_needed,
)
from .._call import Call
from .._sharded import varying
from ._agreement import LARGEST_ERROR, Convergence, convergence, disagreement, implied
from ._looking import looking

# Steps after which an error of x is that of its derivative, where their number is not known.
_MANY = 100


class Steps(NamedTuple):
    """What is differentiated through its steps."""

    run: Callable[[PyTree], tuple[PyTree, PyTree]]  # args -> (x, whatever else)
    residual: Callable[[PyTree, PyTree], PyTree]  # (x, args), zero at a solution
    is_symmetric: bool
    solver: Any


def watched(
    steps: Steps, args: PyTree, x0: PyTree, throw: bool, largest: float = LARGEST_ERROR
) -> tuple[PyTree, PyTree]:
    """`steps.run(args)`; a derivative of its x fails where it is lost, or wrong.

    Lost: not finite. Wrong: where x has converged, by more than `largest`, in comparison with
    the equation `A dx + B da = 0` of the solution, as in the outcome `path_dependent` of an
    estimate. That is looked at where it may be so (`_may_mislead`), for a gradient, two Hessian
    products and, where x has converged, a linear solve on the way back or two products forwards.
    """
    inexact, rest = eqx.partition(args, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)
    x0 = stop_gradient(x0)
    may_mislead = _may_mislead(steps.solver, x0)
    judge = _Judge(steps.residual, steps.is_symmetric, static, throw, largest, may_mislead)
    constant = (arrays, x0, asked_of(steps.solver, x0).rtol)
    entered, *slots = _enter(judge, inexact, constant)
    x, rest = steps.run(eqx.combine(entered, arrays, static))
    return _leave(judge, x, slots, inexact, constant), rest


def _may_mislead(solver: Any, x0: PyTree) -> bool:
    """Whether x may converge, and its derivative through the steps of `solver` may not.

    Steps that build on each other pass on the way they came; and a solver that stops by itself
    may stop at the start, having done nothing. A fixed number of others is what was asked for.
    """
    is_quasi_newton = getattr(solver, "is_quasi_newton", None)
    if is_quasi_newton is not None:
        return is_quasi_newton(x0)
    return not getattr(solver, "is_fixed_length", False)


def residual_of(x: PyTree, args: tuple) -> PyTree:
    """What the solution map of a condition solves; `args` are the condition, x0 and theta."""
    condition, _, theta = args
    return condition.residual_here(x, theta)


def watched_call(
    call: Call, run: Callable[[PyTree], tuple[PyTree, PyTree]], largest: float = LARGEST_ERROR
) -> tuple[PyTree, PyTree]:
    """`run(inputs)` of a call of Optimistix, watched."""
    steps = Steps(run, call.residual, call.is_symmetric, call.solver)
    return watched(steps, call.inputs, call.x0, True, largest)


class _At(NamedTuple):
    """Where a derivative is taken: the arrays that its rule is given."""

    moving: PyTree
    still: PyTree
    x0: PyTree
    rtol: Scalar


class _Judge(NamedTuple):
    """What does not change of a call: no arrays, because derivative rules run later."""

    residual: Callable[[PyTree, PyTree], PyTree]
    is_symmetric: bool
    static: PyTree
    throw: bool
    largest: float
    may_mislead: bool

    def backward(self, found: PyTree, b: PyTree, x: PyTree, at: _At) -> RESULTS:
        """Of `found`, what the steps make of `b`, the cotangent of x."""
        is_lost = tree_all_finite(b) & ~tree_all_finite(found)

        def is_wrong(seen: Convergence) -> Bool[Array, ""]:
            # Under vmap both branches run: a zero right-hand side takes no steps.
            needed = jtu.tree_map(lambda c: jnp.where(seen.is_solution, c, 0), b)
            residual = self._residual(at)
            explained = seen.explained
            expected = implied(residual, x, at.moving, needed, self.is_symmetric, explained)
            return disagreement(found, expected, explained, self.largest)[1]

        return self._judged(is_lost, is_wrong, x, at)

    def forward(self, dx: PyTree, da: PyTree, x: PyTree, at: _At) -> RESULTS:
        """Of `dx`, what the steps make of `da`, the tangent of the arguments."""
        is_lost = tree_all_finite(da) & ~tree_all_finite(dx)
        residual = self._residual(at)

        def is_wrong(seen: Convergence) -> Bool[Array, ""]:
            _, moved = jax.jvp(lambda a: residual(x, a), (at.moving,), (da,))
            _, product = jax.jvp(lambda x: residual(x, at.moving), (x,), (dx,))
            size, left = tree_norm(moved), tree_norm(tree_axpy(1.0, product, moved))
            most = (self.largest + seen.explained) * size
            part = jtu.tree_map(lambda a: (1 + seen.explained).astype(a.dtype) * a, x)
            _, elsewhere = jax.jvp(lambda a: residual(part, a), (at.moving,), (da,))
            most = jnp.maximum(most, tree_norm(tree_sub(elsewhere, moved)))
            return ~(left <= most) & (size > 0)

        return self._judged(is_lost, is_wrong, x, at)

    def _residual(self, at: _At) -> Callable[[PyTree, PyTree], PyTree]:
        def residual(x: PyTree, moving: PyTree) -> PyTree:
            return self.residual(x, eqx.combine(moving, at.still, self.static))

        return residual

    def _judged(
        self,
        is_lost: Bool[Array, ""],
        is_wrong: Callable[[Convergence], Bool[Array, ""]],
        x: PyTree,
        at: _At,
    ) -> RESULTS:
        lost = RESULTS.where(is_lost, RESULTS.nonfinite, RESULTS.successful)
        if not self.may_mislead:
            return lost
        condition, solver = Root(self._residual(at)), _Asked(at.rtol)
        seen = convergence(condition, solver, x, at.x0, at.moving, jnp.asarray(_MANY))
        may_be = seen.is_solution & ~is_lost
        wrong = where_needed(may_be, lambda: is_wrong(seen), jnp.zeros((), bool))
        return RESULTS.where(may_be & wrong, RESULTS.path_dependent, lost)


class _Asked(NamedTuple):
    """What `asked_of` reads."""

    rtol: Scalar


def _at(inexact: PyTree, moves: PyTree, constant: tuple) -> _At:
    inexact, arrays, x0, rtol = stop_gradient((inexact, *constant))
    moving, still = eqx.partition(inexact, moves)
    return _At(moving, eqx.combine(still, arrays), x0, rtol)


def _enter(judge: _Judge, inexact: PyTree, constant: tuple) -> tuple[PyTree, PyTree, PyTree]:
    """`inexact`, and two zeros like x whose cotangents bring that of x, and x itself."""

    @jax.custom_jvp
    def enter(inexact: PyTree, constant: tuple) -> tuple[PyTree, PyTree, PyTree]:
        nothing = tree_zeros_like(constant[1])
        return _in_one_batch((inexact, nothing, nothing), (inexact, constant))

    def enter_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        out = enter(*primals)
        moves, tangent = _moving(tangents[0])
        nothing = tree_zeros_like(out[1])

        def back(seen: tuple, at: _At) -> tuple:
            found, b, x = seen
            evidence = stop_gradient(found), stop_gradient(b), stop_gradient(x)
            result = judge.backward(*evidence, at)
            return or_fail(found, result, judge.throw), b, x

        at = _at(primals[0], moves, primals[1])
        through = looking((tangent, nothing, nothing), at, lambda seen, _: seen, back)
        return out, (jtu.tree_map(tangent_or_zero, out[0], through[0]), *through[1:])

    enter.defjvp(enter_jvp, symbolic_zeros=True)
    return enter(inexact, constant)


def _leave(
    judge: _Judge, x: PyTree, slots: list[PyTree], inexact: PyTree, constant: tuple
) -> PyTree:
    """`x`, whose cotangent goes into the slots, too."""

    @jax.custom_jvp
    def leave(x: PyTree, slots: list[PyTree], inexact: PyTree, constant: tuple) -> PyTree:
        return _in_one_batch(x, (slots, inexact, constant))

    def leave_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        out = leave(*primals)
        moves, da = _moving(tangents[2])
        if not jtu.tree_leaves(da) or not jtu.tree_leaves(_moving(tangents[0])[1]):
            return out, tangents[0]
        dx, slots = jtu.tree_map(_dense, primals[:2], tangents[:2])

        def ahead(seen: tuple, fixed: tuple) -> tuple:
            dx, slots, da = seen
            x, at = fixed
            result = judge.forward(stop_gradient(dx), stop_gradient(da), x, at)
            return or_fail(dx, result, judge.throw), slots, da

        def back(seen: tuple, fixed: tuple) -> tuple:
            b, _, da = seen
            return b, [b, fixed[0]], tree_zeros_like(da)

        fixed = stop_gradient(primals[0]), _at(primals[2], moves, primals[3])
        return out, looking((dx, slots, da), fixed, ahead, back)[0]

    leave.defjvp(leave_jvp, symbolic_zeros=True)
    return leave(x, slots, inexact, constant)


def _in_one_batch(tree: PyTree, others: PyTree) -> PyTree:
    """`tree`, under vmap a batch wherever any of `others` is one.

    What comes back of one element is then told from that of another; and JAX expects of a
    derivative rule a batch of tangents only where the values are one.
    """
    flags = []
    for leaf in jtu.tree_leaves(others):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        numbers = jax.random.key_data(leaf) if is_key else leaf
        if numbers.size:
            flags.append(numbers[(0,) * numbers.ndim] != 0)

    def joined(a: Array) -> Array:
        # What all devices of a `shard_map` share stays so.
        own = [flag for flag in flags if varying(flag) <= varying(a)]
        return jnp.where(functools.reduce(jnp.logical_or, own), a, a) if own else a

    return jtu.tree_map(joined, tree)


def _moving(tangent: PyTree) -> tuple[PyTree, PyTree]:
    """Which leaves move, and their tangents."""
    moves = jtu.tree_map(lambda t: not is_symbolic(t), tangent, is_leaf=is_symbolic)
    return moves, eqx.filter(tangent, moves, is_leaf=is_symbolic)


def _dense(primal: Array, tangent: Any) -> Array:
    return jnp.zeros_like(primal) if is_symbolic(tangent) else tangent
