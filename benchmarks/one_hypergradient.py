"""How long does one hypergradient take, compared with hand-written code and the peers?"""

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import _libraries as libraries
import jax
import jax.numpy as jnp
import numpy as np
from _common import arguments, print_header, print_table, race
from _logistic import (
    Sizes,
    make_data,
    numpy_hypergradient,
    outer,
    parse_sizes,
    reference,
    relative_error,
)

# A peer gets the loosest tolerances of this ladder, in units of those of bilevax, with which it
# is as accurate as bilevax with its defaults.
LADDER = (10.0, 1.0, 0.3, 0.1, 0.03)
ENOUGH = 1.2  # "as accurate": times the error of bilevax
LARGEST_DENSE = 2_000  # BFGS keeps a dense matrix of this order


def main() -> None:
    args = arguments(__doc__ or "")
    jax.config.update("jax_enable_x64", args.float64)
    print_header(__doc__ or "")
    logging.getLogger("jax").setLevel(logging.CRITICAL)  # `tune` expects failures
    text = args.sizes or ("60x8" if args.quick else "2000x100,20000x1000,5000x20000")
    for sizes in parse_sizes(text):
        compare(sizes, "float64" if args.float64 else "float32", args.rounds, args.quick)


def compare(sizes: Sizes, dtype: str, num_rounds: int | None, quick: bool) -> None:
    """One table for the whole hypergradient, one for the part after the inner solve."""
    n, d, _ = sizes
    train, validation, theta = make_data(sizes, dtype)
    data = [tuple(map(jnp.asarray, level)) for level in (train, validation)]
    call = partial(_call, jnp.asarray(theta), jnp.zeros(d, dtype), *data)

    # 1. the accuracy that is asked of everybody
    default = libraries.bilevax("NewtonCG")
    estimate = call(default)[3]
    tolerance = float(estimate.inner_tolerance)
    rtol = 1e-6 if dtype == "float64" else 1e-4  # the default of bilevax.CG
    exact = reference(train, validation, theta, (estimate.x, estimate.v))
    target = ENOUGH * relative_error(estimate.grad, exact.grad)
    print(f"## n = {n:,}, d = {d:,}, {dtype}\n")
    print(f"Inner gradient norm at most {tolerance:.2g}, adjoint residual at most {rtol:.0e};")
    print(f"of the peers, tolerances for a relative error of at most {target:.1e}.\n")

    # 2. the settings of everybody
    programs = {
        "hand-written, JAX": libraries.handwritten(tolerance, rtol),
        "bilevax, default": default,
        "bilevax, LBFGS": libraries.bilevax("LBFGS"),
    }
    factors: dict[str, float | None] = dict.fromkeys(programs)
    b = jax.grad(outer)(estimate.x, theta, data[1])
    scale = float(jnp.sqrt(jnp.mean(b * b)))
    for name, build in libraries.peers(scale).items():
        if name == "optimistix BFGS" and d > LARGEST_DENSE:
            continue
        ladder = LADDER[:1] if quick else LADDER
        found = tune(call, build, ladder, tolerance, rtol, exact, target)
        if found is None:
            print(f"{name}: its linear solver raises with every one of these tolerances.\n")
        else:
            programs[name], factors[name] = found

    # 3. the race
    if num_rounds is None:
        num_rounds = 1 if quick else max(3, min(31, 3_000_000_000 // (n * d * 150)))
    by_numpy = partial(numpy_hypergradient, train, validation, theta, tolerance, rtol)
    cases: dict[str, Callable] = {name: partial(call, p) for name, p in programs.items()}
    cases["hand-written, NumPy"] = by_numpy
    timings = race(cases, num_rounds)
    rows = []
    for name, timing in timings.items():
        is_numpy = name == "hand-written, NumPy"
        grad = by_numpy().grad if is_numpy else call(programs[name])[1]
        base = timings["hand-written, JAX"]
        rows.append(
            (
                name,
                1e3 * float(np.median(timing.wall)),
                timing.ratio(base),
                timing.ratio(base, "cpu"),
                relative_error(grad, exact.grad),
                factors.get(name),
                _counts(by_numpy().num_products if is_numpy else call(programs[name])[3], name),
            )
        )
    header = ("one hypergradient", "ms", "ratio", "CPU ratio", "error", "tolerance", "work")
    print_table(header, rows)
    _compare_adjoints(sizes, theta, estimate.x, data, exact.grad, rtol, num_rounds)


def tune(
    call: Callable,
    build: Callable,
    ladder: tuple[float, ...],
    tolerance: float,
    rtol: float,
    exact: Any,
    target: float,
) -> tuple[Callable, float] | None:
    """The program of the first rung that is accurate enough.

    Where none is, of the first within twice the best error; None if every rung raises.
    """
    rungs: list[tuple[float, Callable, float]] = []
    for factor in ladder:
        program = build(factor * tolerance, factor * rtol)
        try:
            error = relative_error(call(program)[1], exact.grad)
        except jax.errors.JaxRuntimeError:  # Lineax' CG, asked for more than float32 can give
            break
        has_stalled = bool(rungs) and error > 0.8 * min(e for e, *_ in rungs)
        rungs.append((error, program, factor))
        if error <= target or has_stalled:
            break
    if not rungs:
        return None
    good = max(target, 2 * min(e for e, *_ in rungs))
    return next(rung[1:] for rung in rungs if rung[0] <= good)


def _compare_adjoints(
    sizes: Sizes, theta: Any, x: Any, data: Any, exact: Any, rtol: float, num_rounds: int
) -> None:
    """The adjoint system and the cross product alone, at a given x."""
    call = partial(_call, jnp.asarray(theta), x, *data)
    programs = {
        "hand-written, JAX": libraries.handwritten_adjoint(rtol),
        "bilevax, default": libraries.bilevax_adjoint(),
    }
    if any(name.startswith("jaxopt") for name in libraries.peers()):
        programs["jaxopt custom_root"] = libraries.jaxopt_adjoint(rtol)
    timings = race({name: partial(call, p) for name, p in programs.items()}, num_rounds)
    base = timings["hand-written, JAX"]
    rows = [
        (
            name,
            1e3 * float(np.median(timing.wall)),
            timing.ratio(base),
            timing.ratio(base, "cpu"),
            relative_error(call(programs[name])[1], exact),
            _counts(call(programs[name])[3], name),
        )
        for name, timing in timings.items()
    ]
    print_table(("adjoint part, x given", "ms", "ratio", "CPU ratio", "error", "work"), rows)


def _call(theta: Any, x0: Any, train: Any, validation: Any, program: Callable) -> Any:
    return program(theta, x0, train, validation)


def _counts(stats: Any, name: str) -> str:
    """What a library tells of its work."""
    if hasattr(stats, "stats"):
        gradients = int(stats.stats["num_gradients"])
        return f"{gradients} gradients, {int(stats.stats['num_hessian_products'])} products"
    if name.startswith("hand"):
        return f"{int(stats)} products"
    return f"{int(stats)} steps" if int(stats) else "-"


if __name__ == "__main__":
    sys.exit(main())
