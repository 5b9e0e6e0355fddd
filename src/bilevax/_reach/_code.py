"""What the code of a function names: globals, attributes, and what it writes itself."""

import dis
import site
import sys
import sysconfig
import weakref
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

# Methods that change a container in place, as a function does that keeps a log or counts.
_WRITERS = frozenset(
    (
        *("add", "append", "appendleft", "clear", "discard", "extend", "insert"),
        *("pop", "popitem", "popleft", "remove", "setdefault", "update", "write"),
    )
)
_KIND = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_DEREF": "cell",
    "LOAD_CLASSDEREF": "cell",
    "LOAD_ATTR": "attribute",
    "STORE_GLOBAL": "global",
    "STORE_DEREF": "cell",
    "STORE_ATTR": "attribute",
}
_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple(
    {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
        _PACKAGE,
        "<frozen",
    }
)


class Facts(NamedTuple):
    """What one code object, with the functions and classes that are written inside it, names."""

    globals: frozenset[str]
    names: frozenset[str]  # attributes, and strings that may be given to `getattr`
    written: frozenset[tuple[str, str]]  # (kind, name) of what it sets
    filled: frozenset[tuple[str, str]]  # (kind, name) of what it fills in place, if a container


_FACTS: Any = weakref.WeakKeyDictionary()


def facts(code: CodeType) -> Facts:
    """The `Facts` of `code`, read once."""
    found = _FACTS.get(code)
    if found is None:
        found = _FACTS[code] = _read(code)
    return found


def _read(code: CodeType) -> Facts:
    globals_: set[str] = set()
    names = set(code.co_names)
    written: set[tuple[str, str]] = set()
    filled: set[tuple[str, str]] = set()
    before = None
    for instruction in dis.get_instructions(code):
        operation, argument = instruction.opname, instruction.argval
        target = (_KIND[operation], argument) if operation in _KIND else None
        if target and target[0] == "global" and operation.startswith("LOAD"):
            globals_.add(argument)
        if target and operation.startswith("STORE"):
            written.add(target)
        is_method = operation in ("LOAD_METHOD", "LOAD_ATTR")
        if is_method and argument in _WRITERS and before:
            filled.add(before)
        before = target
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inside = facts(constant)
            globals_ |= inside.globals
            names |= inside.names
            written |= inside.written
            filled |= inside.filled
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return Facts(frozenset(globals_), frozenset(names), frozenset(written), frozenset(filled))


def is_library_file(path: str | None) -> bool:
    """Whether a file was installed, so that nobody sets its globals again between two calls."""
    return path is None or path.startswith(_LIBRARIES)


def is_library_module(name: str | None) -> bool:
    """Whether the module of this name was installed. A notebook (`__main__`) was not."""
    module = sys.modules.get(name or "")
    if module is None or name == "__main__":
        return False
    if not hasattr(module, "__file__"):
        return name in sys.builtin_module_names
    return is_library_file(module.__file__)
