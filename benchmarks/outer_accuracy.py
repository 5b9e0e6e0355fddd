"""How many oracle calls does it take to come within a given distance of the optimum?"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, print_header, print_table
from _logistic import Sizes, inner, make_data, outer

import bilevax as bx

GAPS = (1e-2, 1e-4, 1e-6)  # of the first distance


def main() -> None:
    args = arguments(__doc__ or "")
    jax.config.update("jax_enable_x64", True)
    print_header(__doc__ or "")
    sizes = Sizes(200, 10, 50) if args.quick else Sizes(2_000, 100, 500)
    num_steps = 15 if args.quick else 150
    train, validation, theta = make_data(sizes, "float64")
    problem = bx.Bilevel(inner, regularised, train, validation)
    print(
        f"Logistic regression, a strength per feature, n = {sizes.num_samples:,}, "
        f"d = {sizes.num_features}, float64;"
    )
    print("the outer objective is the validation loss + 1e-3 mean theta^2, so that its optimum is")
    print(
        "unique and not at infinity. Calls: gradients, Hessian and cross products of both levels,"
    )
    print("until the exact value is within the given part of the first distance from the optimum")
    print("and stays there; in brackets relative to Adam at a tolerance of 1e-6. Seconds: of the")
    print("whole second run, without compilation.\n")
    best = exact_value(
        problem, run(problem, theta, methods()["OuterLBFGS, 1e-8"], 3 * num_steps)[0][-1]
    )
    rows, base = [], None
    for name, method in methods().items():
        thetas, solution, seconds = run(problem, theta, method, num_steps)
        calls = np.cumsum(
            solution.history.num_gradients
            + solution.history.num_hessian_products
            + solution.history.num_cross_products
        )
        gaps = np.array([exact_value(problem, t) - best for t in thetas])
        reached = [calls_to(calls, gaps, gap * gaps[0]) for gap in GAPS]
        base = reached if base is None else base
        cells = [
            "never" if a is None else f"{a:,}" + (f" ({a / b:.2f})" if b else "")
            for a, b in zip(reached, base, strict=True)
        ]
        steps = solution.stats["num_steps"]
        rows.append((name, *cells, steps, f"{seconds:.2f}", solution.stats["num_flagged"]))
    header = ("method", *(f"calls to {gap:.0e}" for gap in GAPS), "steps", "seconds", "flagged")
    print_table(header, rows)


def regularised(x: Any, theta: Any, data: Any) -> Any:
    """The validation loss, with a weak pull of the logarithms towards their middle."""
    return outer(x, theta, data) + 1e-3 * jnp.mean((theta + 5.0) ** 2)


def methods() -> dict[str, Any]:
    """What is compared; conjugate gradients at both levels."""

    def loop(rtol: float, optimizer: Any, rule: Any = None, tolerances: Any = None) -> Any:
        rule = bx.Implicit(bx.linear.CG(rtol=rtol)) if rule is None else rule
        return bx.DoubleLoop(bx.NewtonCG(rtol=rtol), rule, optimizer, tolerances=tolerances)

    adam, lbfgs = optax.adam(0.1), bx.OuterLBFGS()
    return {
        "Adam, 1e-6": loop(1e-6, adam),
        "Adam, 1e-2": loop(1e-2, adam),
        "Adam, exponential": loop(1e-6, adam, tolerances=bx.ExponentialTolerance()),
        "Adam, quadratic": loop(1e-6, adam, tolerances=bx.PolynomialTolerance()),
        "Adam, cubic": loop(1e-6, adam, tolerances=bx.PolynomialTolerance(power=3)),
        "Adam, Accurate(0.1)": loop(1e-6, adam, bx.Accurate(0.1, linear_solver=bx.linear.CG())),
        "MAID": bx.MAID(bx.NewtonCG(), bx.Implicit(bx.linear.CG())),
        "OuterLBFGS, 1e-8": loop(1e-8, lbfgs),
        "OuterLBFGS, 1e-6": loop(1e-6, lbfgs),
        "OuterLBFGS, 1e-3": loop(1e-3, lbfgs),
        "OuterLBFGS, exponential": loop(1e-6, lbfgs, tolerances=bx.ExponentialTolerance(1e-2)),
    }


def run(
    problem: bx.Bilevel, theta: Any, method: Any, num_steps: int
) -> tuple[list[np.ndarray], bx.Solution, float]:
    """The thetas of all evaluations, the solution, and the time of a second run."""
    thetas: list[np.ndarray] = []
    x0 = jnp.zeros(theta.size)
    keep = {"num_steps": num_steps, "progress": False}
    solution = bx.solve(
        problem, x0, theta, method, callback=lambda p: thetas.append(np.asarray(p.theta)), **keep
    )
    thetas.append(np.asarray(solution.theta))
    bx.solve(problem, x0, theta, method, **keep)
    began = time.perf_counter()
    bx.solve(problem, x0, theta, method, **keep)
    # The last evaluation may have been repeated.
    thetas += [thetas[-1]] * (len(solution.history) - len(thetas))
    return thetas[: len(solution.history)], solution, time.perf_counter() - began


def exact_value(problem: bx.Bilevel, theta: np.ndarray) -> float:
    """The outer objective with the inner problem solved to 1e-10."""
    x0 = jnp.zeros(theta.size)
    tight = bx.NewtonCG(rtol=1e-10)
    rule = bx.Implicit(bx.linear.CG(num_steps=1))  # only the value is wanted
    estimate, _ = bx.hypergradient(
        problem, x0, jnp.asarray(theta), inner_solver=tight, rule=rule, throw=False
    )
    return float(estimate.value)


def calls_to(calls: np.ndarray, gaps: np.ndarray, gap: float) -> int | None:
    """The calls after which the distance is at most `gap` for good."""
    above = np.flatnonzero(gaps > gap)
    first = 0 if above.size == 0 else above[-1] + 1
    return int(calls[first]) if first < len(calls) else None


if __name__ == "__main__":
    sys.exit(main())
