"""Whether something reached is another one than at its first sight, for JAX' own caches.

JAX keeps the trace of a loop's body, and of a jitted function, by the identity of the
function: it would go on with what the function reached when it was first traced. Programs
of a later state are traced in a context of their own.
"""

import contextlib
import weakref
from collections import OrderedDict
from typing import Any

import jax

_MAX_CONTAINERS = 64  # which are kept alive, as lists and dicts know no weak references

_FIRSTS: dict[int, tuple[Any, dict[Any, Any]]] = {}
_CONTAINERS: OrderedDict[int, tuple[Any, dict[Any, Any]]] = OrderedDict()


def is_as_at_first(owner: Any, state: dict[Any, Any]) -> bool:
    """Whether what `owner` reaches is what it reached when it was first seen."""
    name = id(owner)
    known = _FIRSTS.get(name) or _CONTAINERS.get(name)
    if known is not None and (known[0]() if name in _FIRSTS else known[0]) is owner:
        first = known[1]
        changed = [key for key, value in state.items() if first.setdefault(key, value) != value]
        return not changed
    try:
        _FIRSTS[name] = weakref.ref(owner, lambda _: _FIRSTS.pop(name, None)), dict(state)
    except TypeError:
        _CONTAINERS[name] = owner, dict(state)
        if len(_CONTAINERS) > _MAX_CONTAINERS:
            _CONTAINERS.popitem(last=False)
    return True


if hasattr(jax, "make_user_context"):
    _context = jax.make_user_context(0)

    def tracing_context(state: int) -> Any:
        """The context of a program: 0 is that of everybody."""
        return _context(state) if state else contextlib.nullcontext()

else:  # older versions of JAX: all traces are forgotten, once for every state
    _forgotten: set[int] = set()

    def tracing_context(state: int) -> Any:
        """The context of a program: 0 is that of everybody."""
        if state and state not in _forgotten:
            _forgotten.add(state)
            jax.clear_caches()
        return contextlib.nullcontext()
