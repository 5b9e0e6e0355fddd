"""How long do tracing, lowering and compiling one hypergradient take?"""

import json
import sys
import time
from typing import Any

from _common import arguments, has, median, print_header, print_table, race_fresh

NAMES = (
    "hand-written",
    "bilevax NewtonCG",
    "bilevax LBFGS",
    "optimistix LBFGS",
    "optimistix BFGS",
    "jaxopt LBFGS zoom",
    "jaxopt LBFGS backtracking",
    "jaxopt GradientDescent",
)
STAGES = ("import", "trace", "lower", "compile", "total")


def main() -> None:
    args = arguments(__doc__ or "")
    if args.child:
        print(json.dumps(measure(args.child[0])))
        return
    print_header(__doc__ or "")
    num_rounds = args.rounds or (1 if args.quick else 5)
    names = [name for name in NAMES if has(name.split()[0]) or name == "hand-written"]
    if args.quick:
        names = names[:2]
    results = race_fresh(__file__, [("--child", name) for name in names], num_rounds)
    rows = []
    for name in names:
        rounds = results["--child", name]
        rows.append((name, *(median(rounds, stage) for stage in STAGES)))
    print("CPU seconds in a fresh process, float32, n = 2,000, d = 100, medians of", num_rounds)
    print()
    print_table(("one hypergradient", *STAGES), rows)


def measure(name: str) -> dict[str, float]:
    """CPU seconds of every stage, in this process."""
    began = time.process_time()
    stages = {}

    def lap(stage: str) -> None:
        nonlocal began
        now = time.process_time()
        stages[stage], began = now - began, now

    import jax
    from _logistic import Sizes, make_data

    program = build(name)
    lap("import")
    train, validation, theta = make_data(Sizes(2_000, 100, 500), "float32")
    arguments = jax.device_put((theta, 0 * theta, train, validation))
    jax.block_until_ready(arguments)
    lap("data")
    # all through one outer jit: bilevax compiles by itself, the others are jitted already
    traced = jax.jit(lambda *args: program(*args)[:3]).trace(*arguments)
    lap("trace")
    lowered = traced.lower()
    lap("lower")
    lowered.compile()
    lap("compile")
    stages["total"] = sum(stages[k] for k in ("trace", "lower", "compile"))
    return stages


def build(name: str) -> Any:
    """The program of a library and its method, to about the accuracy of bilevax' defaults."""
    import _libraries as libraries

    library, _, method = name.partition(" ")
    if library == "hand-written":
        return libraries.handwritten(6e-6, 1e-4)
    if library == "bilevax":
        return libraries.bilevax(method)
    if library == "optimistix":
        return libraries.optimistix(method, 1e-2, 1e-5, 1e-5)
    return libraries.jaxopt(method, 2e-6, 3e-5)


if __name__ == "__main__":
    sys.exit(main())
