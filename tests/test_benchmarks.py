"""The benchmarks run: tiny sizes, no judgement of any time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "benchmarks").glob("[!_]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_prints_its_table(script):
    # A process of its own: the scripts choose the precision, and start processes. Compiled as
    # the tests are (see `processes.py`), since no time is judged.
    done = subprocess.run(
        [sys.executable, str(script), "--quick"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert any("---" in row for row in rows), done.stdout
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert not {"nan", "inf"} & set(cells), done.stdout


def test_there_is_one_script_per_question():
    assert len(SCRIPTS) >= 6
