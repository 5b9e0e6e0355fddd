"""The traced values that functions hold: in closures, defaults, partials and objects."""

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.tree_util as jtu
from jaxtyping import PyTree

_JITTED: Any = type(jax.jit(lambda: None))
_EMPTY: Any = object()


def is_tracer(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


class Replaced:
    """`tree`, with `change(value)` for all of `is_chosen` in it and in what its functions hold.

    What holds none is left alone, so that state which several functions share stays shared.
    """

    def __init__(self, tree: PyTree, is_chosen: Callable, change: Callable) -> None:
        self._is_chosen, self._change = is_chosen, change
        self._seen: dict[int, tuple[Any, Any]] = {}
        self.tree = self._of(tree)

    def _of(self, tree: PyTree) -> PyTree:
        return jtu.tree_map(self._leaf, tree)

    def _leaf(self, value: Any) -> Any:
        if self._is_chosen(value):
            return self._change(value)
        if id(value) not in self._seen:
            # Registered before its parts are, for a function that holds itself.
            self._seen[id(value)] = value, value
            if self._holds(value):
                self._rebuild(value)
        return self._seen[id(value)][1]

    def _holds(self, tree: PyTree) -> bool:
        """Whether there is one to replace in `tree`."""
        waiting, seen = [tree], {}
        while waiting:
            for leaf in jtu.tree_leaves(waiting.pop()):
                if self._is_chosen(leaf):
                    return True
                if id(leaf) not in seen:
                    seen[id(leaf)] = leaf
                    waiting += _parts(leaf)
        return False

    def _rebuild(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            new: Any = types.MethodType(self._of(value.__func__), self._of(value.__self__))
            self._seen[id(value)] = value, new
        elif isinstance(value, functools.partial):
            words = self._of(value.keywords)
            new = functools.partial(self._of(value.func), *self._of(value.args), **words)
            self._seen[id(value)] = value, new
        elif isinstance(value, _JITTED):
            self._seen[id(value)] = value, self._of(value.__wrapped__)
        else:
            new = copy.copy(value)
            self._seen[id(value)] = value, new
            for name, part in vars(value).items():
                object.__setattr__(new, name, self._of(part))

    def _function(self, fn: types.FunctionType) -> None:
        cells = fn.__closure__ or ()
        is_new = [self._holds(_contents(cell)) for cell in cells]
        new_cells = [types.CellType() if n else c for n, c in zip(is_new, cells, strict=True)]
        closure = tuple(new_cells) or None
        new = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, None, closure)
        self._seen[id(fn)] = fn, new
        for cell, new_cell in zip(cells, new_cells, strict=True):
            if new_cell is not cell:
                new_cell.cell_contents = self._of(cell.cell_contents)
        new.__defaults__ = self._of(fn.__defaults__)
        new.__kwdefaults__ = self._of(fn.__kwdefaults__)
        new.__dict__.update(self._of(fn.__dict__))


def _parts(value: Any) -> Iterator[Any]:
    """What a value that is not a pytree holds."""
    if isinstance(value, types.FunctionType):
        yield from map(_contents, value.__closure__ or ())
        yield from (value.__defaults__, value.__kwdefaults__, value.__dict__)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, _JITTED):
        yield value.__wrapped__
    elif not isinstance(value, (type, types.ModuleType)):
        yield dict(getattr(value, "__dict__", {}))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return _EMPTY
