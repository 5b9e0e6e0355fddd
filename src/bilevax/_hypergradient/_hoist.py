"""What a function closes over, traced values among it, as arguments of a compiled program."""

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax.core
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._reach._tokens import Whole
from .._tree import closure_convert


@jtu.register_pytree_node_class
class Hoisted:
    """`fn`, traced on `args`, with what it closes over as leaves.

    Two that were traced into the same program are equal but for their leaves, so that one
    compiled program serves both: a function that makes its inner objective anew in every
    call, and is differentiated without a `jax.jit` around it, compiles once.
    """

    def __init__(self, fn: Callable, *args: PyTree) -> None:
        # Equinox leaves a function without a closure as it is, global names and all.
        converted = closure_convert(partial(fn), *args)
        leaves, treedef = jtu.tree_flatten(converted)
        self.arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
        self.program = _Program(treedef, [None if eqx.is_array(a) else a for a in leaves])

    def __call__(self, *args: PyTree) -> PyTree:
        arrays = iter(self.arrays)
        leaves = [next(arrays) if leaf is None else leaf for leaf in self.program.rest]
        return jtu.tree_unflatten(self.program.treedef, leaves)(*args)

    def tree_flatten(self) -> tuple[list[Array], "_Program"]:
        return self.arrays, self.program

    @classmethod
    def tree_unflatten(cls, program: "_Program", arrays: Any) -> "Hoisted":
        self = object.__new__(cls)
        self.arrays, self.program = list(arrays), program
        return self


class _Program(Whole):
    """A traced function without its arrays; equal to another that computes the same."""

    def __init__(self, treedef: Any, rest: list[Any]) -> None:
        self.treedef, self.rest = treedef, rest
        self.has_tracer = False
        parts = [_name(treedef)]
        for leaf in rest:
            if _is_jaxpr(leaf):
                parts += [str(leaf), *self._parts(leaf)]
            else:
                parts.append(_name(leaf))
        self._key = tuple(parts)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self._key == other._key

    def _parts(self, jaxpr: Any) -> Iterator[Hashable]:
        """What the text of a program does not show: constants, and functions by their names."""
        for constant in getattr(jaxpr, "consts", ()):
            self.has_tracer |= isinstance(constant, jax.core.Tracer)
            yield id(constant)  # alive as long as this is
        for equation in jaxpr.eqns:
            for value in equation.invars:
                if hasattr(value, "val"):
                    yield np.asarray(value.val).tobytes()
            for value in jtu.tree_leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
                yield from self._parts(value) if _is_jaxpr(value) else (_name(value),)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _name(value: Any) -> Hashable:
    """By its own equality; what has none, by identity: it lives as long as the program."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value
