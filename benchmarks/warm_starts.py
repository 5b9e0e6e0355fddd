"""How many products do warm starts save?"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, print_header, print_table

import bilevax as bx
from bilevax.testing import EVEN_FREQUENCIES, relative_error, ridge

SCALE_DECADES = 1.5


def main() -> None:
    args = arguments(__doc__ or "")
    jax.config.update("jax_enable_x64", True)
    print_header(__doc__ or "")
    n, d, num_steps = (20, 10, 5) if args.quick else (200, 100, 50)
    tolerances = (1e-2,) if args.quick else (1e-2, 1e-3, 1e-6)
    print(f"{num_steps} Adam steps, ridge with a strength per feature, n = {n}, d = {d}, feature")
    print(f"scales from 1 to 10^-{SCALE_DECADES}, float64; both systems solved by conjugate")
    print("gradients to the relative tolerance. Products are those with the Hessian, those that")
    print("measure residuals included; in brackets the gradients.\n")
    rows, errors = [], []
    for name, problem in (
        ("Gaussian", gaussian(n, d)),
        ("even frequencies", even_frequencies(n, d)),
    ):
        exact = run(problem, d, num_steps, 1e-10, True, True)
        for rtol in tolerances:
            runs = [
                run(problem, d, num_steps, rtol, inner, adjoint)
                for adjoint in (False, True)
                for inner in (False, True)
            ]
            products = [r.stats["num_hessian_products"] for r in runs]
            rows.append((name, rtol, *map(_products, runs), products[0] / products[-1]))
            errors.append((name, rtol, *_errors(runs[0], exact), *_errors(runs[-1], exact)))
    header = ("products", "rtol", "cold", "warm x", "warm v", "warm both", "cold / both")
    print_table(header, rows)
    print("The same result? Against a run with both tolerances 1e-10:\n")
    header = ("error of", "rtol", "cold: value", "cold: theta", "warm: value", "warm: theta")
    print_table(header, errors)


def run(
    problem: bx.Bilevel, d: int, num_steps: int, rtol: float, inner: bool, adjoint: bool
) -> bx.Solution:
    """One run; no time is measured."""
    method = bx.DoubleLoop(
        bx.NewtonCG(rtol=rtol, dense=False),
        bx.Implicit(bx.linear.CG(rtol=rtol)),
        optax.adam(0.1),
        start="warm" if inner else "cold",
        warm_start_adjoint=adjoint,
    )
    return bx.solve(
        problem, jnp.zeros(d), jnp.zeros(d), method, num_steps=num_steps, progress=False, throw=True
    )


def gaussian(n: int, d: int) -> bx.Bilevel:
    """Independent Gaussian features, a linear model and noise."""
    rng = np.random.default_rng(0)
    scale = np.logspace(0.0, -SCALE_DECADES, d)
    weights = rng.standard_normal(d)

    def level() -> tuple[np.ndarray, np.ndarray]:
        A = rng.standard_normal((n, d)) * scale
        return A, A @ weights + 0.5 * rng.standard_normal(n)

    return _as_ridge(level(), level())


def even_frequencies(n: int, d: int) -> bx.Bilevel:
    """The oracle of `bilevax.testing`: cosines whose frequencies are spread evenly."""
    oracle = ridge(
        num_samples=n,
        num_features=d,
        num_validation=n,
        feature_scale_decades=SCALE_DECADES,
        frequencies=EVEN_FREQUENCIES,
    )
    return oracle.problem


def _as_ridge(train: Any, validation: Any) -> bx.Bilevel:
    """These data in the objectives of the oracle."""
    pattern = even_frequencies(3, 2)
    return bx.Bilevel(pattern.inner.fn, pattern.outer, train, validation)


def _errors(solution: bx.Solution, exact: bx.Solution) -> tuple[float, float]:
    """Relative errors of the final value and of theta."""
    value = abs(float(solution.value) - float(exact.value)) / float(exact.value)
    return value, relative_error(solution.theta, exact.theta)


def _products(solution: bx.Solution) -> str:
    stats = solution.stats
    return f"{stats['num_hessian_products']:,} ({stats['num_gradients']})"


if __name__ == "__main__":
    sys.exit(main())
