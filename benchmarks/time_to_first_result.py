"""How long does a person wait for the first result, from the start of the process?"""

import json
import sys

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
JOBS = {"import": "import alone", "one": "one hypergradient", "loop": "50 outer steps"}


def main() -> None:
    args = arguments(__doc__ or "")
    if args.child:
        job, name = args.child
        print(json.dumps(work(job, name)))
        return
    print_header(__doc__ or "")
    num_rounds = args.rounds or (1 if args.quick else 5)
    names = [name for name in NAMES if has(name.split()[0]) or name == "hand-written"]
    jobs = list(JOBS)
    if args.quick:
        names, jobs = names[:2], jobs[:2]
    print("A fresh process: start of Python, import, data (2,000 x 100), trace, compile, run.")
    print(f"Medians of {num_rounds}, taken in turn.\n")
    for job in jobs:
        # importing does not depend on the method
        chosen = [n for n in names if job != "import" or n in _first_of_each(names)]
        results = race_fresh(__file__, [("--child", job, n) for n in chosen], num_rounds)
        base = results["--child", job, "hand-written"]
        rows = [
            (
                name if job != "import" else name.split()[0],
                median(rounds, "wall"),
                median(rounds, "cpu"),
                median(rounds, "cpu") / median(base, "cpu"),
            )
            for (_, _, name), rounds in results.items()
        ]
        print_table((JOBS[job], "wall, s", "CPU, s", "CPU ratio"), rows)


def work(job: str, name: str) -> dict:
    """What the fresh process does."""
    library = name.partition(" ")[0]
    if job == "import":
        import optax  # noqa: F401  everybody's outer optimiser

        __import__({"hand-written": "jax"}.get(library, library))
        return {}
    if job == "loop":
        from outer_loop import loop

        theta, _ = loop(name, 50)()
        return {"theta": float(theta[0])}
    import jax
    from _logistic import Sizes, make_data
    from compile_time import build

    train, validation, theta = make_data(Sizes(2_000, 100, 500), "float32")
    theta, train, validation = jax.device_put((theta, train, validation))
    value, grad, *_ = build(name)(theta, 0 * theta, train, validation)
    return {"value": float(value), "grad": float(grad[0])}


def _first_of_each(names: list[str]) -> list[str]:
    """One name of each library."""
    return list({name.split()[0]: name for name in reversed(names)}.values())


if __name__ == "__main__":
    sys.exit(main())
