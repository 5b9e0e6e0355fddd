"""The directive `{api}`: public names, documented from their Markdown docstrings.

Sphinx' autodoc reads docstrings as reStructuredText; ours are Markdown, as people read and
write them in an editor. So the directive writes one MyST page section per name, with
Sphinx' own `py:class` and `py:function` around the docstring, and lets MyST parse it.
"""

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import signature, stringify_signature
from sphinx.util.typing import ExtensionMetadata

import bilevax

# `!!! example` and its indented block, as MkDocs, editors and Equinox' documentation have it.
ADMONITION = re.compile(r'^!!! (\w+)(?: "(.+)")?\n((?:\n|    .*\n?)+)', re.MULTILINE)
# `Name`, `bx.Name` and `Name()` in running text.
NAME = re.compile(
    r"(?<![`}\w])`((?:bx\.)?(?:(?:linear|precondition|records)\.)?(\w+)(?:\(\))?)`(?!`)"
)


def to_myst(docstring: str) -> str:
    """A docstring with its admonitions and its references to public names written for MyST."""

    def admonition(match: re.Match[str]) -> str:
        title = match[2] or match[1].capitalize()
        body = textwrap.dedent(match[3]).strip()
        return f":::{{admonition}} {title}\n:class: tip\n\n{body}\n:::\n"

    def reference(match: re.Match[str]) -> str:
        for home in ("", "linear.", "precondition.", "records."):
            module = importlib.import_module(f"bilevax.{home}".rstrip("."))
            value = vars(module).get(match[2])
            if value is not None and not inspect.ismodule(value):
                return f"{{py:obj}}`{match[1]} <bilevax.{home}{match[2]}>`"
        return match[0]

    return NAME.sub(reference, ADMONITION.sub(admonition, docstring))


def lookup(name: str) -> Any:
    """What a user gets as `bilevax.name`."""
    *modules, last = name.split(".")
    return getattr(importlib.import_module(".".join(["bilevax", *modules])), last)


def entry(name: str, value: Any, kind: str, depth: int = 8) -> str:
    """One name as MyST; the members of a class inside it, with a shorter fence."""
    doc = value.__doc__
    if not doc:
        raise ExtensionError(f"bilevax.{name} has no docstring")
    arguments = ""
    if kind != "property" and value is not bilevax.RESULTS:  # outcomes are not constructed
        arguments = stringify_signature(
            signature(value, bound_method=kind == "method"),
            show_annotation=False,
            show_return_annotation=False,
        )
    body = to_myst(inspect.cleandoc(doc))
    for member, attribute in members(value) if kind == "class" else ():
        member_kind = "property" if isinstance(attribute, property) else "method"
        body += "\n\n" + entry(f"{name}.{member}", attribute, member_kind, depth - 1)
    fence = "`" * depth
    return f"{fence}{{py:{kind}}} {name}{arguments}\n:module: bilevax\n\n{body}\n{fence}\n"


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the class documents itself."""
    for name in vars(cls):
        attribute = inspect.getattr_static(cls, name)
        value = attribute if isinstance(attribute, property) else getattr(cls, name)
        is_member = isinstance(value, property) or inspect.isroutine(value)
        if is_member and value.__doc__ and not name.startswith("_"):
            yield name, value


class ApiDirective(SphinxDirective):
    """The names in its body, one a line, in that order."""

    has_content: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        """Parse what `entry` writes as a part of the page."""
        node = nodes.Element()
        for name in self.content:
            value = lookup(name)
            kind = "class" if inspect.isclass(value) else "function"
            lines = entry(name, value, kind).splitlines()
            source = f"docstring of bilevax.{name}"
            self.state.nested_parse(StringList(lines, source=source), self.content_offset, node)
        return node.children


class OutcomesDirective(SphinxDirective):
    """Every outcome in `RESULTS`, with its message."""

    def run(self) -> list[nodes.Node]:
        """A definition list."""
        lines = []
        for name in bilevax.RESULTS.names():
            message = bilevax.RESULTS[getattr(bilevax.RESULTS, name)]
            lines += [f"`RESULTS.{name}`", f": {message or 'Right to the stated accuracy.'}", ""]
        node = nodes.Element()
        source = StringList(lines, source="bilevax.RESULTS")
        self.state.nested_parse(source, self.content_offset, node)
        return node.children


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.add_directive("api", ApiDirective)
    app.add_directive("outcomes", OutcomesDirective)
    return {"parallel_read_safe": True}
