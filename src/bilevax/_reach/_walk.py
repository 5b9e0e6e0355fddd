"""The walk over everything that functions can reach besides their arguments."""

import builtins
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import numpy as np

from ._code import facts, is_library_file, is_library_module
from ._firsts import is_as_at_first
from ._places import CONTAINERS, Place, are_all_same, flat_items, has_content, is_container, is_it
from ._tokens import Content, OnHost, Same, atom_token, identity

MISSING: Any = object()

# Whoever uses one of these may read any attribute.
_READS_ANY = frozenset(("getattr", "vars", "__dict__", "asdict", "astuple", "fields", "attrgetter"))
# Methods that Python calls without their name standing in the code; these others run when
# an object is made, copied or shown, not when it is used.
_NOT_USED = frozenset(
    (
        *("__init__", "__new__", "__post_init__", "__init_subclass__", "__class_getitem__"),
        *("__setattr__", "__delattr__", "__setitem__", "__delitem__", "__set_name__", "__del__"),
        *("__eq__", "__ne__", "__hash__", "__repr__", "__str__", "__format__"),
        *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"),
        *("__copy__", "__deepcopy__", "__replace__"),
    )
)
# Objects beyond this many are compared by identity: a function that reaches more reaches the
# insides of some library.
_MAX_OBJECTS = 5_000


class Walk:
    """One pass over what is reached. `token(value)` is a hashable part of a key.

    `names` are the attributes that the code is known to use, `written` those that it sets;
    the pass finds more of both, so that it is repeated until it finds none. `scratch` are
    places that tracing a function has changed: what it writes itself is not among its data.
    """

    def __init__(self, names: frozenset, written: frozenset, scratch: Mapping) -> None:
        self.names, self.written, self.scratch = names, written, scratch
        self.found: set[str] = set()
        self.found_written: set[tuple[str, str]] = set()
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any]] = []
        self.slots: list[tuple[Mapping, str, Any]] = []
        self.places: list[Place] = []
        self.has_tracer = False
        self.is_as_at_first = True
        self.alive: list[Any] = []
        self._seen: dict[int, int] = {}

    def token(self, value: Any) -> Any:
        """What stands for `value`; the insides of mutable ones are watched from now on."""
        if isinstance(value, jax.core.Tracer):
            self.has_tracer = True
            return Same(object())  # a traced value is a new one in every trace
        if _is_atom(value):
            return atom_token(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        if len(self.alive) >= _MAX_OBJECTS:
            return Same(value)
        self._seen[id(value)] = len(self.alive)
        self.alive.append(value)
        for kind, token in _TOKENS.items():
            if isinstance(value, kind):
                return token(self, value)
        return self._object(value)

    def _tuple(self, value: tuple) -> Any:
        return type(value), tuple(self.token(item) for item in value)

    def _method(self, value: types.MethodType) -> Any:
        return "method", self.token(value.__self__), self.token(value.__func__)

    def _partial(self, value: functools.partial) -> Any:
        words = self._items(value.keywords)
        return "partial", self.token(value.func), self.token(value.args), words

    def _wrapper(self, value: Any) -> Any:
        """What a class holds in the place of a method."""
        names = ("__func__", "fget", "func")
        return type(value), tuple(self.token(getattr(value, name, None)) for name in names)

    def _module(self, value: types.ModuleType) -> Any:
        return Same(value), self._named(vars(value), is_all=False, holder=value)

    def _function(self, fn: types.FunctionType) -> Any:
        code, known = fn.__code__, facts(fn.__code__)
        self.found |= known.names
        self.found_written |= {item for item in known.written if item[0] == "attribute"}
        self.found_written |= {("filled", n) for kind, n in known.filled if kind == "attribute"}
        cells = [
            self._cell(cell, ("cell", name) in known.written, ("cell", name) in known.filled)
            for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True)
        ]
        parts: list[Any] = ["function", code, tuple(cells)]
        self.functions.append((fn, code, fn.__defaults__))  # a notebook may reload them in place
        state: dict[Any, Any] = {"defaults": id(fn.__defaults__), "code": id(code)}
        for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
            if ("cell", name) not in known.written:
                state["cell", name] = _mark(_contents(cell))
        parts.append(self.token(fn.__defaults__))
        if fn.__kwdefaults__:
            parts.append(self._items(fn.__kwdefaults__))
        if fn.__dict__:
            parts.append(self._named(fn.__dict__, is_all=False))
            parts.append(self.token(getattr(fn, "__wrapped__", None)))
        if is_library_file(code.co_filename):
            self._compare(fn, state)
            return *parts, fn.__module__
        reached = fn.__globals__
        for name in sorted(known.globals):
            value = reached.get(name, MISSING)
            is_written, is_filled = (("global", name) in w for w in (known.written, known.filled))
            parts.append(self._slot(reached, name, value, is_written, is_filled))
            if value is MISSING:
                parts.append(name if hasattr(builtins, name) else None)
            elif not is_written:
                state["global", name] = _mark(value)
        self._compare(fn, state)
        return tuple(parts)

    def _compare(self, owner: Any, state: dict[Any, Any]) -> None:
        if not is_as_at_first(owner, state):
            self.is_as_at_first = False

    def _cell(self, cell: types.CellType, is_written: bool, is_filled: bool) -> Any:
        read = functools.partial(_contents, cell)
        return self._place(cell, "cell_contents", read, is_written, is_filled)

    def _slot(
        self, owner: Mapping, name: str, value: Any, is_written: bool, is_filled: bool
    ) -> Any:
        """The value of a name in a namespace, which may be set again."""
        if is_written or (id(owner), name) in self.scratch:
            return None
        self.slots.append((owner, name, value))
        return self._value(value, is_filled)

    def _place(
        self,
        owner: Any,
        name: str,
        read: Callable[[], Any],
        is_written: bool = False,
        is_filled: bool = False,
    ) -> Any:
        value = read()
        if is_written or (id(owner), name) in self.scratch:
            return None
        self.places.append(Place(owner, (id(owner), name), read, value, is_it))
        return self._value(value, is_filled)

    def _value(self, value: Any, is_filled: bool) -> Any:
        if value is MISSING:
            return None
        return Same(value) if is_filled and is_container(value) else self.token(value)

    def _array(self, array: np.ndarray) -> Any:
        if array.dtype.hasobject or (id(array), None) in self.scratch:
            return Same(array)
        content = Content(array)
        if array.flags.writeable or array.base is not None:
            place = Place(array, (id(array), None), lambda: array, content, has_content)
            self.places.append(place)
        self._compare(array, {"content": hash(content.raw)})
        return content

    def _container(self, value: Any) -> Any:
        """A container is itself with what is in it: callbacks may write into it."""
        if (id(value), None) in self.scratch:
            return Same(value)
        return Same(value), self._items(value)

    def _items(self, value: Any) -> Any:
        flat = flat_items(value)
        self._compare(value, dict(enumerate(map(_mark, [*flat, len(flat)]))))
        self.places.append(
            Place(value, (id(value), None), lambda: flat_items(value), flat, are_all_same)
        )
        return tuple(self.token(item) for item in flat)

    def _class(self, cls: type) -> Any:
        parts: list[Any] = [Same(cls)]
        for owner in cls.__mro__:
            if is_library_module(owner.__module__) or owner is object:
                continue
            for name, value in list(vars(owner).items()):
                is_called = name.startswith("__") and isinstance(value, types.FunctionType)
                if (name in self.names or is_called) and name not in _NOT_USED:
                    parts.append((name, self._attribute(vars(owner), name, value, owner)))
        return tuple(parts)

    def _object(self, value: Any) -> Any:
        cls = type(value)
        parts = [identity(value), self._class(cls)]
        if isinstance(getattr(value, "__dict__", None), dict):
            parts.append(self._attributes(value))
        for owner in cls.__mro__:
            slots = vars(owner).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name in self.names and not is_library_module(owner.__module__):
                    read = functools.partial(getattr, value, name, MISSING)
                    parts.append(self._place(value, name, read))
        return tuple(parts)

    def _attributes(self, value: Any) -> Any:
        cls = type(value)
        is_all = is_library_module(cls.__module__) and (
            callable(value) or hasattr(cls, "__getattr__") or hasattr(cls, "__getitem__")
        )
        return self._named(vars(value), is_all, cls, value)

    def _named(
        self, owner: Mapping, is_all: bool, cls: type | None = None, holder: Any = None
    ) -> Any:
        """The attributes that some code names, or all, where it may read any."""
        is_all = is_all or not self.names.isdisjoint(_READS_ANY)
        parts = []
        for name in list(owner) if is_all else sorted(self.names):
            value = owner.get(name, MISSING)
            if value is MISSING and not hasattr(cls, name):
                continue
            parts.append((name, self._attribute(owner, name, value, holder)))
        return tuple(parts)

    def _attribute(self, owner: Mapping, name: str, value: Any, holder: Any) -> Any:
        is_written = ("attribute", name) in self.written
        if holder is not None and not is_written:
            self._compare(holder, {name: _mark(value)})
        return self._slot(owner, name, value, is_written, ("filled", name) in self.written)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return MISSING


def _mark(value: Any) -> Any:
    """Numbers by value, objects by their address."""
    return atom_token(value) if isinstance(value, bool | int | float | str) else id(value)


def _is_atom(value: Any) -> bool:
    """Whether nothing in it can change."""
    if isinstance(value, types.ModuleType):
        return is_library_module(value.__name__)
    return value is None or isinstance(value, _ATOMS)


_ATOMS = (
    *(bool, int, float, complex, str, bytes, np.generic, np.dtype),
    *(jax.Array, types.BuiltinFunctionType, OnHost),
)
_TOKENS: dict[Any, Callable[[Walk, Any], Any]] = {
    types.FunctionType: Walk._function,
    types.MethodType: Walk._method,
    functools.partial: Walk._partial,
    (staticmethod, classmethod, property, functools.cached_property): Walk._wrapper,
    type: Walk._class,
    types.ModuleType: Walk._module,
    np.ndarray: Walk._array,
    tuple: Walk._tuple,
    CONTAINERS: Walk._container,
}
