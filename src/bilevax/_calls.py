"""Calls of the user's functions: an error in one says which it was, and with what."""

import contextlib
import traceback
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._reach._code import is_library_file

_LONGEST = 400  # characters of one argument's description


@contextlib.contextmanager
def naming(name: str, **arguments: PyTree) -> Generator[None]:
    """Adds to an error in a user's function its name, its arguments and the user's own line."""
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        if not any(note.startswith("bilevax:") for note in notes):
            error.add_note("\n".join([*_lines(error, name, arguments)]))
        raise


def _lines(error: Exception, name: str, arguments: dict[str, PyTree]) -> Iterator[str]:
    described = [f"{key}: {describe(value)}" for key, value in arguments.items()]
    yield f"bilevax: `{name}` was called with {', '.join(described)}."
    for key, value in arguments.items():
        if _is_list_of_numbers(value):
            yield f"`{key}` is a list of numbers; for a vector write jnp.asarray([...])."
    if isinstance(error, jax.errors.TracerArrayConversionError):
        yield "NumPy functions cannot be traced: use those of jax.numpy in its place."
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_library_file(frame.filename)
    ]
    if own:
        last = own[-1]
        yield f"{last.filename}:{last.lineno}, in {last.name}: {last.line}"


def describe(tree: PyTree) -> str:
    """Shapes and dtypes, in the structure of `tree`."""
    text = str(jtu.tree_map(_describe_leaf, tree)).replace("'", "")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _describe_leaf(leaf: Any) -> Any:
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf).__name__


def _is_list_of_numbers(value: PyTree) -> bool:
    return isinstance(value, list) and bool(value) and all(np.ndim(item) == 0 for item in value)
