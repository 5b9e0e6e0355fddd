"""The Python blocks of the README, of the documentation pages and of the docstrings run.

Pages that MyST-NB executes use `{code-cell}`, so their code is not run twice.
"""

import pytest
from documents import ROOT, code_blocks, public_docstrings, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
    monkeypatch.chdir(tmp_path)  # what an example writes is thrown away
    run(code, request.node.name)
