"""What every benchmark needs: fair timing, fresh processes, tables, and what ran them."""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("bilevax", "jax", "jaxlib", "jaxopt", "optimistix", "lineax", "optax", "numpy")


class Timing(NamedTuple):
    """Seconds of every round; the rounds of all cases of one race belong together."""

    wall: list[float]
    cpu: list[float]

    def ratio(self, other: "Timing", kind: str = "wall") -> float:
        """Median over the rounds of `self / other`: a busy round meets both."""
        pairs = zip(getattr(self, kind), getattr(other, kind), strict=True)
        return statistics.median(a / b for a, b in pairs)


def race(cases: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, Timing]:
    """Time all cases in turn, in rotating order, after one warm-up call of each."""
    import jax

    for case in cases.values():
        jax.block_until_ready(case())
    timings = {name: Timing([], []) for name in cases}
    names = list(cases)
    for k in range(num_rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(cases[name]())
            timings[name].wall.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)
    return timings


def fresh(script: str, *arguments: str) -> dict[str, Any]:
    """Run `script` in a new process: the JSON it prints last, and its wall and CPU seconds.

    The CPU seconds are those of the whole process, the start of Python included.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall, "cpu": cpu}


def race_fresh(
    script: str, cases: Iterable[tuple[str, ...]], num_rounds: int
) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """`fresh` for every case, in rotating order; one uncounted round fills the disk caches."""
    cases = list(cases)
    results: dict[tuple[str, ...], list[dict[str, Any]]] = {case: [] for case in cases}
    for case in cases if num_rounds > 1 else ():
        fresh(script, *case)
    for k in range(num_rounds):
        first = k % len(cases)
        for case in cases[first:] + cases[:first]:
            results[case].append(fresh(script, *case))
    return results


def median(rounds: list[dict[str, Any]], key: str) -> float:
    """Median of one number over the rounds of `race_fresh`."""
    return statistics.median(float(r[key]) for r in rounds)


def temp_bytes(fn: Callable, *args: Any) -> int:
    """Peak working memory of the compiled `fn(*args)`, arguments and results left out."""
    import jax

    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def has(package: str) -> bool:
    """Whether a peer is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


def arguments(description: str) -> argparse.Namespace:
    """The command line: `--quick` for a tiny run that shows only that everything works."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--float64", action="store_true", help="default: float32")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds")
    parser.add_argument("--sizes", default=None, help="n x d, as 2000x100,20000x1000")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def print_header(question: str) -> None:
    """The question, and what the answer was measured with."""
    versions = [f"{name} {version(name)}" for name in PACKAGES if has(name)]
    absent = [name for name in PACKAGES if not has(name)]
    print(f"# {question}\n")
    print(f"python {platform.python_version()}, {', '.join(versions)}")
    if absent:
        print(f"not installed, left out: {', '.join(absent)} (pip install bilevax[bench])")
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{_processor()}, {os.cpu_count()} cores, load {load}\n", flush=True)


def print_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A Markdown table, aligned for reading in a terminal too."""
    header = list(header)
    lines = [header, *([_text(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    print(line(header))
    rules = ("-" * w if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths))
    print(f"| {' | '.join(rules)} |")
    for cells in lines[1:]:
        print(line(cells))
    print(flush=True)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
