"""Rules, solvers, conditions as one would write them, on one line."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import numpy as np

_MOST_CHARACTERS = 60  # of a container


class OneLine:
    """A mix-in: `print` shows what was asked for, on one line.

    `stands_for` names the field that is shown in the place of a wrapper.
    """

    stands_for: ClassVar[str | None] = None

    def __repr__(self) -> str:
        return as_written(self)


def as_written(choice: Any) -> str:
    """An object as one would write it: what differs from the defaults only."""
    if not dataclasses.is_dataclass(choice) or isinstance(choice, type):
        return shown(choice)
    stands_for = getattr(choice, "stands_for", None)
    if stands_for is not None:
        return as_written(getattr(choice, stands_for))
    default, parts = _made_by_default(type(choice)), []
    is_ours = type(choice).__module__.startswith("bilevax")
    parameters = list(inspect.signature(type(choice).__init__).parameters.items())[1:]
    for k, (name, parameter) in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        text = shown(getattr(choice, name, parameter.default))
        usual = getattr(default, name, parameter.default)
        if usual is not parameter.empty and text == shown(usual):
            continue
        if not is_ours and inspect.isfunction(getattr(choice, name, None)):
            continue  # others make functions of what they were given
        parts.append(text if k == 0 else f"{name}={text}")
    prefix = _prefix(type(choice)) if is_ours else ""
    return f"{prefix}{type(choice).__name__}({', '.join(parts)})"


def _prefix(cls: type) -> str:
    package = cls.__module__.split(".")[1]
    return f"bx.{package[1:]}." if package in ("_linear", "_precondition", "_prox") else "bx."


def shown(value: Any) -> str:
    """A value on one line: numbers as such, arrays by dtype and shape, functions by name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if eqx.is_array_like(value) and not isinstance(value, bool | int | complex):
        return _array(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_written(value)
    if hasattr(value, "init") and hasattr(value, "update"):
        return _optimizer(value)
    if isinstance(value, tuple | list | dict):
        text = " ".join(eqx.tree_pformat(value).split())
        return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def _made_by_default(cls: type) -> Any:
    """An object of a class of ours with all its defaults, which signatures often leave open."""
    try:
        return cls() if cls.__module__.startswith("bilevax") else None
    except TypeError:  # something must be given
        return None


def _array(value: Any) -> str:
    if np.ndim(value) == 0:
        # Traced, deleted, donated, random keys: what has no value to show has a type.
        with contextlib.suppress(Exception):
            return shown(np.asarray(value).item())
    return eqx.tree_pformat(value)


def _optimizer(optimizer: Any) -> str:
    """An Optax optimiser, which is nothing but closures, by the functions that made them."""
    parts = [part for part in _parts(optimizer.update) if part != "identity"]
    if not parts:
        return type(optimizer).__name__
    return parts[0] if len(parts) == 1 else f"optax.chain({', '.join(parts)})"


def _parts(update: Callable) -> list[str]:
    function, held = _closure(update)
    made_by, is_local, _ = getattr(function, "__qualname__", "").partition(".<locals>")
    if not is_local:
        return []
    if made_by == "chain":
        return [part for inner in held.get("update_fns", ()) for part in _parts(inner)]
    if made_by == "with_extra_args_support" and "tx" in held:
        return _parts(held["tx"].update)
    return [f"scale({shown(held['step_size'])})" if made_by == "scale" else made_by]


def _closure(fn: Any) -> tuple[Any, dict[str, Any]]:
    """A function, and what it closes over; as it is, or as a pytree of Equinox."""
    if hasattr(fn, "contents"):
        function = fn.fn.fn
        return function, dict(zip(function.__code__.co_freevars, fn.contents or (), strict=True))
    cells = getattr(fn, "__closure__", None) or ()
    names = fn.__code__.co_freevars if cells else ()
    held = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return fn, held
