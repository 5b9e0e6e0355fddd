"""A module imports only from layers below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "bilevax"


def layers() -> list[list[str]]:
    """The order of CONTRIBUTING.md, the only one: a line a layer, the lowest first."""
    house = (ROOT / "CONTRIBUTING.md").read_text().split("## The house")[1].split("## ")[0]
    return [line.split() for line in house.splitlines() if line.startswith("    ")]


RANK = {name: rank for rank, layer in enumerate(layers()) for name in layer}


def upward_imports(source: str, path: Path) -> list[str]:
    """The imports in `source`, a file at `path` in the package, of its own layer or above."""
    unit = path.with_suffix("").parts[0]
    assert unit in RANK, f"{path} belongs to no layer: give it its place in CONTRIBUTING.md"
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            # `from ..a import b` in bilevax/_inner/_x.py: two levels up from it is bilevax.
            package = ("bilevax", *path.parts)[: -node.level] if node.level else ()
            module = [*package, *(node.module or "").split(".")]
            targets = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for target in ([part for part in names if part] for names in targets):
            if target[0] == "bilevax":
                # A public name comes from the top, which `__init__` stands for.
                name = target[1] if len(target) > 1 and target[1] in RANK else "__init__"
                if name != unit and RANK[name] >= RANK[unit]:
                    found.append(f"{path}:{node.lineno} imports {name}")
    return found


FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def test_every_layer_exists():
    units = {path.with_suffix("").parts[0] for path in FILES}
    assert units == set(RANK)


def test_imports_go_one_way():
    assert [v for p in FILES for v in upward_imports((SOURCE / p).read_text(), p)] == []


def graph(files: dict[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports; `files` maps `bilevax._inner._base` to its source."""
    edges: dict[str, set[str]] = {module: set() for module in files}
    for module, source in files.items():
        package = module.split(".")[:-1]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) + 1 - node.level]
                names = [*base, *(node.module or "").split(".")]
                name = ".".join(part for part in names if part)
                for target in (name, *(f"{name}.{alias.name}" for alias in node.names)):
                    edges[module] |= {target} & files.keys()
    return edges


def circle(edges: dict[str, set[str]]) -> set[str]:
    """The modules that import each other, through others or not, and what lies between."""
    left = dict(edges)
    while ends := [m for m, found in left.items() if not found & left.keys()]:
        for module in ends:
            del left[module]
    return set(left)


def test_no_module_imports_itself_through_others():
    names = {".".join(("bilevax", *path.with_suffix("").parts)): path for path in FILES}
    modules = {name: (SOURCE / path).read_text() for name, path in names.items()}
    edges = graph(modules)
    assert sum(map(len, edges.values())) > 500  # it sees the imports
    assert circle(edges) == set()


def test_a_circle_is_found():
    files = {
        "bilevax._x._a": "from ._b import f",
        "bilevax._x._b": "def f():\n    from .._x import _c",
        "bilevax._x._c": "from .._x._a import g",
        "bilevax._x._d": "from ._a import h",
    }
    assert circle(graph(files)) == {f"bilevax._x._{k}" for k in "abcd"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("_inner/_x.py", "from .._solve import solve"),
        ("_inner/_x.py", "from .. import _outer"),
        ("_inner/_x.py", "def f():\n    from .._report._y import b"),
        ("_tree.py", "from ._results import RESULTS"),
        ("_tree.py", "import bilevax._linear._cg as cg"),
        ("_problem/_door.py", "from bilevax import Bilevel"),
        ("_linear/__init__.py", "from .. import Minimum"),
        ("testing/_x.py", "from .. import _demo"),
    ],
)
def test_an_upward_import_is_found(path, source):
    assert len(upward_imports(source, Path(path))) == 1


def test_downward_imports_are_allowed():
    source = "import jax\nfrom ._base import A\nfrom .._tree import b\nfrom .. import _results"
    assert upward_imports(source, Path("_inner/_x.py")) == []
