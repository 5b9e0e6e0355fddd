"""Does `bx.recommend` find the fastest rule that is accurate enough?"""

import sys
from collections.abc import Callable
from typing import Any

import _recommend_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
from _common import arguments, print_header, print_table, race

import bilevax as bx

RTOL = 1e-3  # of the hypergradient
MOST_SECONDS = 5.0  # a rule that takes longer than this for one hypergradient is out of the race


def main() -> None:
    args = arguments(__doc__ or "")
    jax.config.update("jax_enable_x64", True)
    print_header(__doc__ or "")
    print(
        "Milliseconds of one hypergradient, the inner solve included, the shortest of all rounds; "
        f"wanted: relative error {RTOL}."
    )
    print("Best: the fastest rule that has it, found by trying all. Ratio: recommended to best.\n")
    rows = []
    for case in problems.all_cases(args.quick):
        rounds = args.rounds or (1 if args.quick else 15)
        rows.append(judge(case, rounds, verbose=not args.quick))
    header = ("problem", "accurate / tried", "best", "ms", "recommended", "ms", "error", "ratio")
    print_table(header, rows)


def judge(case: problems.Case, num_rounds: int, verbose: bool) -> tuple:
    """One row: all rules side by side, and the recommended one among them."""
    advice = bx.recommend(
        case.problem, case.x0, case.theta, inner_solver=case.inner_solver, rtol=RTOL
    )
    print(f"{case.name}\n  {advice.reason}", flush=True)
    truth = bx.hypergradient(
        case.problem,
        case.x0,
        case.theta,
        inner_solver=case.truth_solver,
        rule=case.truth,
        throw=False,  # asked for more than the last digit
    )[0].grad
    rules = candidates(case)
    chosen = next((name for name, rule in rules.items() if rule == advice.rule), "recommended")
    rules.setdefault(chosen, advice.rule)
    calls, errors = {}, {}
    for name, rule in rules.items():
        call = caller(case, rule)
        error = tried(call, truth)
        if error is not None:
            calls[name], errors[name] = call, error
    # 1. all of them, a few times; 2. the recommended and the best others, often
    first = times_of(calls, min(num_rounds, 3))
    accurate = sorted((n for n in first if errors[n] <= RTOL), key=lambda n: first[n])
    finalists = {name: calls[name] for name in (*accurate[:3], chosen)}
    timings = race(finalists, num_rounds)
    best = min(finalists, key=lambda name: min(timings[name].wall))
    ratio = min(timings[chosen].wall) / min(timings[best].wall)
    if verbose:
        for name in sorted(first, key=lambda name: first[name]):
            print(f"    {name:<28} {1e3 * first[name]:9.3f} ms   error {errors[name]:.1e}")
        print(flush=True)
    return (
        case.name,
        f"{len(accurate)} / {len(rules)}",
        best,
        1e3 * min(timings[best].wall),
        str(advice.rule),
        1e3 * min(timings[chosen].wall),
        f"{errors[chosen]:.0e}",
        f"{ratio:.2f}",
    )


def times_of(calls: dict[str, Callable], num_rounds: int) -> dict[str, float]:
    """The shortest time of each: what is longer was disturbed."""
    return {name: min(timing.wall) for name, timing in race(calls, num_rounds).items()}


def candidates(case: problems.Case) -> dict[str, Any]:
    """Every rule that could be tried; those that cannot be used drop out."""
    rules: dict[str, Any] = {
        "Implicit()": bx.Implicit(),
        "Implicit(Neumann(10))": bx.Implicit(bx.linear.Neumann(10)),
        "OneStep()": bx.OneStep(),
        "MinimumNorm()": bx.MinimumNorm(),
        "Unrolled()": bx.Unrolled(),
        "Unrolled('all')": bx.Unrolled(checkpoints="all"),
        "Truncated(10)": bx.Truncated(10),
    }
    if case.problem.inner.is_symmetric:
        jacobi = bx.Implicit(bx.linear.CG(rtol=1e-4), preconditioner=bx.precondition.Jacobi())
        rules["Implicit(CG(1e-3))"] = bx.Implicit(bx.linear.CG(rtol=1e-3))
        rules["Implicit(CG, Jacobi)"] = jacobi
        rules["Polished()"] = bx.Polished(bx.linear.CG(rtol=1e-2))
    else:
        rules["Implicit(GMRES(1e-3))"] = bx.Implicit(bx.linear.GMRES(rtol=1e-3))
    if case.size <= 500:
        rules["Implicit(Direct)"] = bx.Implicit(bx.linear.Direct())
    if hasattr(bx, "ForwardMode") and case.num_outer <= 20:
        rules["ForwardMode()"] = bx.ForwardMode()
    return rules


def caller(case: problems.Case, rule: Any) -> Callable:
    """One hypergradient, as a user calls it."""

    def call() -> Any:
        estimate, _ = bx.hypergradient(
            case.problem,
            case.x0,
            case.theta,
            inner_solver=case.inner_solver,
            rule=rule,
            throw=False,
        )
        return estimate.grad

    return call


def tried(call: Callable, truth: Any) -> float | None:
    """The relative error; `None` for a rule that cannot be used, or takes too long."""
    try:
        grad = call()
    except (TypeError, ValueError):
        return None
    difference = jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in leaves(grad, truth)))
    error = float(difference / jnp.sqrt(sum(jnp.sum(b**2) for _, b in leaves(grad, truth))))
    seconds = float(np.median(race({"": call}, 1)[""].wall))
    return error if np.isfinite(error) and seconds < MOST_SECONDS else None


def leaves(a: Any, b: Any) -> list:
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


if __name__ == "__main__":
    sys.exit(main())
