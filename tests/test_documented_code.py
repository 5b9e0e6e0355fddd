"""The Python blocks of the README, of the documentation pages and of the docstrings run.

Pages that MyST-NB executes use `{code-cell}`, so their code is not run twice.
"""

import re

import pytest
from documents import ROOT, code_blocks, public_docstrings, run

import bilevax

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Named in examples, and not built yet. Their blocks wait; any other unknown name fails.
PLANNED = {"solve", "hypergradient", "argmin", "Implicit", "Unrolled", "OneStep", "DoubleLoop"}


def blocks() -> list:
    """One test case per block, named after its place."""
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    texts |= {f"bilevax.{name}": text for name, text in public_docstrings().items()}
    return [
        pytest.param(code, id=f"{title}-{number}")
        for title, text in texts.items()
        for number, code in enumerate(code_blocks(text))
    ]


@pytest.mark.usefixtures("user_settings")
@pytest.mark.parametrize("code", blocks())
def test_code_runs(code, request, monkeypatch, tmp_path):
    waits_for = {n for n in re.findall(r"\bbx\.(\w+)", code) if n in PLANNED - vars(bilevax).keys()}
    if waits_for:
        pytest.skip(f"not built yet: {sorted(waits_for)}")
    monkeypatch.chdir(tmp_path)  # what an example writes is thrown away
    run(code, request.node.name)
