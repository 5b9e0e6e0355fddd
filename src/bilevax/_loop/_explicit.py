"""Derivative rules of our own for loops: a step with all that it depends on as arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from .._jit import standard_promotion
from .._tree import closure_convert, is_symbolic
from ._probe import Probe

# In this file a carry is in two parts: its floating-point arrays, which have an adjoint,
# and the rest (counts, keys, labels).
State = tuple[PyTree, PyTree]


class ExplicitStep(NamedTuple):
    """`step`, and the state it starts from, taken apart.

    Law: `apply(varying, fixed, state)` is the new state. `varying` are the floating-point
    arrays that the step closed over (theta, data, a learning rate), `fixed` the others.
    """

    apply: Callable[[PyTree, PyTree, State], State]
    varying: PyTree[Array]
    fixed: PyTree[Array]
    state: State


class WayBack(NamedTuple):
    """What a way back needs beside the states that were kept.

    - `apply(state)`: the step.
    - `pull_back(state, adjoint)`: the adjoint of the step's `moving` and of its carry, of
        the part of it that matters; the others are `None`.
    - `push_forward(state, tangent, direction)`: the step, and the tangent of its carry.
    - `moving`: what is differentiated of all that the step closed over. Theta, but not the
        data, whose adjoint would be as large as they are.
    """

    apply: Callable[[State], State]
    pull_back: Callable[[State, PyTree], tuple[PyTree, PyTree]]
    push_forward: Callable[[State, PyTree, PyTree], tuple[State, PyTree]]
    moving: PyTree[Array]


def explicit_step(step: Callable[[PyTree], PyTree], carry: PyTree[Array]) -> ExplicitStep:
    """`step` and `carry`, taken apart."""
    converted = closure_convert(step, carry)
    varying, others = eqx.partition(converted, eqx.is_inexact_array)
    fixed, static = eqx.partition(others, eqx.is_array)

    def apply(varying: PyTree, fixed: PyTree, state: State) -> State:
        whole: Any = eqx.combine(varying, fixed, static)
        with standard_promotion():  # the step may have been traced under it, for Optax
            out = whole(eqx.combine(*state))
        return eqx.partition(out, eqx.is_inexact_array)

    return ExplicitStep(apply, varying, fixed, eqx.partition(carry, eqx.is_inexact_array))


def repeat_with_way_back(
    step: Callable[[PyTree], PyTree],
    carry: PyTree[Array],
    run: Callable[[Callable[[State], State], State], State],
    forward: Callable[[WayBack, State], tuple[State, PyTree]],
    backward: Callable[[WayBack, PyTree, PyTree, Probe | None], tuple[PyTree, PyTree, PyTree]],
    probe: Probe | None,
) -> PyTree[Array]:
    """A loop over `step` with a reverse mode of its own.

    - `run(apply, state)`: the last state.
    - `forward(steps, state)`: the same, and what is kept for the way back.
    - `backward(steps, kept, adjoint, probe)`: the adjoint of `steps.moving`, of the first
        carry, and what is to be reported through `probe` (see `_probe.py`).
    """
    apply, *arguments = explicit_step(step, carry)
    # The rules run when the values of this call are gone.
    shapes = jax.eval_shape(lambda arguments: arguments, arguments)

    @jax.custom_vjp
    def loop(varying: PyTree, fixed: PyTree, state: State, probe: Probe | None) -> State:
        del probe
        return run(lambda state: apply(varying, fixed, state), state)

    def loop_forward(*args: PyTree) -> tuple[State, PyTree]:
        varying, fixed, state, probe = _values(args)
        is_moving = _Flags(tuple(leaf.perturbed for leaf in _primals(args[0])))
        final, kept = forward(_way_back(apply, varying, fixed, is_moving), state)
        return final, (varying, fixed, kept, probe, is_moving)

    def loop_backward(residuals: PyTree, cotangent: State) -> tuple:
        varying, fixed, kept, probe, is_moving = residuals
        adjoint = _part_that_matters(apply, shapes, cotangent[0])
        steps = _way_back(apply, varying, fixed, is_moving, adjoint)
        of_moving, of_carry, evidence = backward(steps, kept, adjoint, probe)
        return of_moving, None, (of_carry, None), evidence

    loop.defvjp(loop_forward, loop_backward, symbolic_zeros=True)
    return eqx.combine(*loop(*arguments, probe))


class _Flags(eqx.Module):
    """For every array that varies, whether it is differentiated."""

    flags: tuple[bool, ...] = eqx.field(static=True)


def _way_back(
    apply: Callable[[PyTree, PyTree, State], State],
    varying: PyTree,
    fixed: PyTree,
    is_moving: _Flags,
    adjoint: PyTree | None = None,
) -> WayBack:
    structure = jtu.tree_structure(varying)
    moving, still = eqx.partition(varying, jtu.tree_unflatten(structure, is_moving.flags))
    flags = jtu.tree_map(lambda leaf: leaf is not None, adjoint, is_leaf=lambda leaf: leaf is None)

    def differentiable(moving: PyTree, state: State) -> State:
        return apply(eqx.combine(moving, still), fixed, state)

    def pull_back(state: State, adjoint: PyTree) -> tuple[PyTree, PyTree]:
        carry, rest = state
        matters, other = eqx.partition(carry, flags)

        def part_that_matters(moving: PyTree, matters: PyTree) -> PyTree:
            new, _ = differentiable(moving, (eqx.combine(matters, other), rest))
            return eqx.filter(new, flags)

        return jax.vjp(part_that_matters, moving, matters)[1](adjoint)

    def push_forward(state: State, tangent: PyTree, direction: PyTree) -> tuple[State, PyTree]:
        carry, rest = state
        new, new_tangent, new_rest = jax.jvp(
            lambda m, c: differentiable(m, (c, rest)),
            (moving, carry),
            (direction, tangent),
            has_aux=True,
        )
        return (new, new_rest), new_tangent

    return WayBack(lambda state: differentiable(moving, state), pull_back, push_forward, moving)


def _part_that_matters(apply: Callable, shapes: list, cotangent: PyTree) -> PyTree:
    """The adjoint of the last carry, `None` for what no later x depends on.

    A solver's own error estimate is such a part. Its adjoint would be zero, and its
    derivative may be infinite.
    """
    leaves, structure = jtu.tree_flatten(cotangent, is_leaf=is_symbolic)
    traced: Any = jax.make_jaxpr(apply)(*shapes)
    num_before = len(jtu.tree_leaves(shapes[:2]))
    num_other = len(traced.jaxpr.outvars) - len(leaves)
    matters = [not is_symbolic(leaf) for leaf in leaves]
    while True:
        _, used = partial_eval.dce_jaxpr(traced.jaxpr, [*matters, *[False] * num_other])
        used = used[num_before : num_before + len(leaves)]
        grown = [a or b for a, b in zip(matters, used, strict=True)]
        if grown == matters:
            break
        matters = grown
    part = [_materialise(a) if keep else None for a, keep in zip(leaves, matters, strict=True)]
    return jtu.tree_unflatten(structure, part)


def _primals(tree: PyTree) -> list:
    return jtu.tree_leaves(tree, is_leaf=_is_primal)


def _values(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _materialise(leaf: Any) -> Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if is_symbolic(leaf) else leaf
