"""The Python code in the README, in the documentation pages and in the docstrings."""

import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import bilevax
import bilevax.linear
import bilevax.precondition
import bilevax.prox
import bilevax.records
import bilevax.testing

ROOT = Path(__file__).parents[1]
MODULES = {
    "": bilevax,
    "linear.": bilevax.linear,
    "precondition.": bilevax.precondition,
    "prox.": bilevax.prox,
    "records.": bilevax.records,
    "testing.": bilevax.testing,
}
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


def public_objects() -> dict[str, Any]:
    """What the user gets, by the name that follows `bilevax.`; not what was imported for it."""
    return {
        prefix + name: value
        for prefix, module in MODULES.items()
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", "").startswith("bilevax")
    }


def code_blocks(text: str) -> list[str]:
    """The fenced Python blocks of a Markdown text, in order."""
    return [textwrap.dedent(match["code"]) for match in FENCE.finditer(text)]


def public_docstrings() -> dict[str, str]:
    """Name to docstring, of every public name and of its own public members."""
    found = {}
    for name, value in public_objects().items():
        found[name] = inspect.getdoc(value) or ""
        for member, attribute in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and isinstance(attribute.__doc__, str):
                found[f"{name}.{member}"] = inspect.cleandoc(attribute.__doc__)
    return found


def run(code: str, title: str) -> None:
    """Execute a block in a namespace of its own; the title stands in the traceback."""
    exec(compile(code, title, "exec"), {"__name__": "__main__"})
