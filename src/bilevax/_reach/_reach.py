"""`reach`: the key of what functions can reach, computed again only where something changed.

A compiled program holds, as constants, what the user's functions reached when they were
traced: closure cells, globals, attributes of `self`. Each of these may be set again between
two calls, and the old program would then give the old answer. So they belong to its key.
"""

import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from ._code import is_library_module
from ._tokens import Key, Whole
from ._walk import MISSING, Walk

ARRAY: Any = type("Array", (), {"__doc__": "Stands for an array among the static leaves."})()

# Walks and written places that are remembered. A walk that was forgotten is made again, in
# less than a millisecond; until then it keeps alive what it found.
_MAX_REMEMBERED = 64
_WALKS: OrderedDict[Any, "Reach"] = OrderedDict()
_SCRATCH: OrderedDict[tuple[int, Any], Any] = OrderedDict()


def reach(treedef: Any, leaves: tuple) -> "Reach":
    """What is reached from the leaves that are no arrays, and from the nodes of `treedef`."""
    name = treedef, tuple([_name(leaf) for leaf in leaves])
    try:
        found = _WALKS.get(name)
    except (TypeError, ValueError) as error:  # of the comparison
        raise TypeError(
            "The static fields of a registered class are compared between two calls, which "
            "arrays do not allow: declare fields that hold arrays as ordinary ones."
        ) from error
    if found is None or not found.is_current():
        found = Reach(treedef, leaves)
        if not found.has_tracer:
            _remember(_WALKS, name, found)
    return found


class Reach:
    """What was reached when this was made.

    `key` is equal for what compiles to one program; `state` is that of `tracing_context`.
    """

    def __init__(self, treedef: Any, leaves: tuple) -> None:
        names, written = frozenset(), frozenset()
        is_as_at_first = True
        while True:  # the attributes that the code uses are known after the first pass
            walk = Walk(names, written, _SCRATCH)
            parts = ["array" if leaf is ARRAY else walk.token(leaf) for leaf in leaves]
            parts += [_node_token(walk, *data) for data in _nodes(treedef)]
            is_as_at_first = is_as_at_first and walk.is_as_at_first
            if walk.found <= names and walk.found_written <= written:
                break
            names, written = names | walk.found, written | walk.found_written
        self.key = Key((treedef, tuple(parts)))
        self.has_tracer = walk.has_tracer
        self.state = 0 if is_as_at_first or walk.has_tracer else hash(self.key) or 1
        self._functions, self._slots, self._places = walk.functions, walk.slots, walk.places
        self._alive = leaves, walk.alive  # their addresses stand for them

    def is_current(self) -> bool:
        """Whether all is as it was: microseconds, but for large NumPy arrays."""
        for fn, code, defaults in self._functions:
            if fn.__code__ is not code or fn.__defaults__ is not defaults:
                return False
        for owner, name, value in self._slots:
            if owner.get(name, MISSING) is not value:
                return False
        return all(place.is_same(place.read(), place.value) for place in self._places)

    def forget_changes(self) -> None:
        """What has changed while the functions were traced is what they write: no data."""
        slots, places = [], []
        for slot in self._slots:
            is_same = slot[0].get(slot[1], MISSING) is slot[2]
            slots.append(slot) if is_same else _remember(_SCRATCH, (id(slot[0]), slot[1]), slot)
        for place in self._places:
            is_same = place.is_same(place.read(), place.value)
            places.append(place) if is_same else _remember(_SCRATCH, place.address, place)
        self._slots, self._places = slots, places


def _remember(memory: OrderedDict, name: Any, value: Any) -> None:
    memory[name] = value
    memory.move_to_end(name)
    while len(memory) > _MAX_REMEMBERED:
        try:
            memory.popitem(last=False)
        except KeyError:  # another thread was faster
            break


def _name(leaf: Any) -> Any:
    """Two leaves of one name are one object, or equal numbers."""
    kind = type(leaf)
    if kind is types.MethodType:  # made anew by every access to the attribute
        return id(leaf.__self__), id(leaf.__func__)
    if kind is int or kind is float or kind is str or kind is bool:
        return kind, leaf
    return id(leaf)


def _nodes(treedef: Any) -> Iterator[tuple[type, Any]]:
    """Type and static part of every node of a registered class."""
    data = treedef.node_data()
    if data is None:
        return
    if data[0] not in (tuple, list, dict, type(None)):
        yield data
    for child in treedef.children():
        yield from _nodes(child)


def _node_token(walk: Walk, cls: type, static: Any) -> Any:
    methods = None if is_library_module(cls.__module__) else walk.token(cls)
    return methods, _static_token(walk, static)


def _static_token(walk: Walk, static: Any) -> Any:
    """What the functions in it reach; that the rest is equal is known from the treedef."""
    if isinstance(static, tuple | list):
        return tuple(_static_token(walk, item) for item in static)
    if isinstance(static, dict):
        return tuple(_static_token(walk, item) for item in static.values())
    if static is None or isinstance(static, bool | int | float | str | np.dtype | Whole):
        return None
    return walk.token(static)
