"""The files a demonstration leaves behind."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and machine: numbers without them mean little."""
    packages = ("bilevax", "jax", "equinox", "optax", "optimistix", "lineax", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        **{name: version(name) for name in packages},
    }


def write_json(path: Path, numbers: dict[str, Any]) -> None:
    """`numbers` as JSON that every reader accepts: a NaN is an error."""
    path.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
