"""Every script in `examples/` runs as it stands, in JAX' own settings, and prints something.

Each in a process of its own, because some switch float64 on before the first array is made.
"""

import subprocess
import sys

import pytest
from documents import ROOT
from processes import as_users_have_it

EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs(script, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(script)],
        env=as_users_have_it(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_there_are_examples():
    assert EXAMPLES
