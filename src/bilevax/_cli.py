"""The command line: `python -m bilevax demo [cleaning|tuning]`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default `sys.argv`); returns the exit code."""
    arguments = _parser().parse_args(argv)
    # The application's own process, so that its configuration is ours to set. In float64:
    # the reference of the cost table needs it, and it takes no more than 1.5 times as long
    # as float32 on this problem.
    import jax

    jax.config.update("jax_enable_x64", True)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        _run(arguments.name, arguments.output, arguments.seed, arguments.quick)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        print(
            f"bilevax: the demo needs {package}, which is not installed: "
            "python -m pip install 'bilevax[demo]'",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"bilevax: cannot write to {arguments.output}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bilevax: interrupted", file=sys.stderr)
        return 130
    return 0


_EXTRAS = ("mlxtend", "sklearn", "matplotlib", "tqdm")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevax", description="Bilevel optimization in JAX: demonstrations on real data."
    )
    parser.add_argument("--version", action="version", version=f"bilevax {version('bilevax')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="solve a real problem, print and draw what was found",
        description="cleaning: find the wrong labels among real digits, and measure what each "
        "hypergradient costs. tuning: one regularisation strength per feature.",
    )
    demo.add_argument("name", nargs="?", choices=("cleaning", "tuning"), default="cleaning")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("bilevax-demo"),
        metavar="DIR",
        help="where the picture and the numbers go (default: %(default)s)",
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, help="of the splits and the wrong labels (default: 0)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="a small part of the data: to see that it runs"
    )
    return parser


def _run(name: str, output: Path, seed: int, is_quick: bool) -> None:
    # Imported here: the demonstrations need the optional dependencies, `--help` does not.
    if name == "cleaning":
        from ._demo import run_cleaning as run
    else:
        from ._demo import run_tuning as run
    run(output, seed, is_quick)


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:  # what NumPy and scikit-learn accept
        raise ValueError
    return seed
