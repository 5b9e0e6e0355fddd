"""What does a step of CG cost beside its product, and how long does each solver compile?"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from _common import arguments, median, print_header, print_table, race, race_fresh

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
# Up to this size the Hessian of a logistic regression, above a banded matrix.
LARGEST_DENSE = 1_000
# Long enough to be timed, short enough that no residual reaches the rounding errors.
STEPS = 20
SOLVERS = (
    "hand-written",
    "bilevax CG",
    "lineax CG",
    "jax.scipy cg",
    "bilevax MINRES",
    "bilevax Chebyshev",
    "bilevax Direct",
)


def main() -> None:
    args = arguments(__doc__ or "")
    dtype = "float64" if args.float64 else "float32"
    if args.child:
        print(json.dumps({"compile": compile_time(args.child[0], dtype)}))
        return
    import jax

    jax.config.update("jax_enable_x64", args.float64)
    print_header(__doc__ or "")
    num_rounds = args.rounds or (2 if args.quick else 21)
    rows = [step_time(size, dtype, num_rounds) for size in (SIZES[:1] if args.quick else SIZES)]
    print(f"Microseconds a step, {dtype}, {STEPS} steps, medians of {num_rounds} rounds; with a")
    print("number of steps given, and with a tolerance, which watches the true residual.\n")
    print_table(("size", "hand-written", "num_steps", "ratio", "rtol", "ratio"), rows)

    num_rounds = 1 if args.quick else 5
    names = SOLVERS[:2] if args.quick else SOLVERS
    option = ("--float64",) if args.float64 else ()
    cases = {name: ("--child", name, *option) for name in names}
    results = race_fresh(__file__, cases.values(), num_rounds)
    print(f"CPU seconds to trace, lower and compile, size 100, medians of {num_rounds}.\n")
    rows = [(name, median(results[case], "compile")) for name, case in cases.items()]
    print_table(("solver", "seconds"), rows)


def step_time(size: int, dtype: str, num_rounds: int) -> tuple[Any, ...]:
    """One row: the same number of steps of both, timed in turn."""
    import jax

    import bilevax as bx

    system, b = make_system(size, dtype)

    def compiled(solver: bx.linear.CG) -> Callable:
        return jax.jit(lambda system, b: solver.solve(lambda v: product(system, v), b).value)

    @jax.jit
    def by_hand(system: Any, b: Any) -> Any:
        return handwritten(lambda v: product(system, v), b, 0.0, STEPS)

    # Small systems finish in microseconds: several calls in one timing.
    calls = max(1, 2_000 // size)

    def repeated(fn: Callable) -> Callable:
        def run() -> Any:
            for _ in range(calls):
                out = fn(system, b)
            return out

        return run

    fns = {
        "hand": by_hand,
        "fixed": compiled(bx.linear.CG(num_steps=STEPS)),
        "measured": compiled(bx.linear.CG(rtol=0.0, max_steps=STEPS)),
    }
    timings = race({name: repeated(fn) for name, fn in fns.items()}, num_rounds)
    hand, fixed, measured = (
        statistics.median(t.wall) * 1e6 / (calls * STEPS) for t in timings.values()
    )
    ratios = [timings[name].ratio(timings["hand"]) for name in ("fixed", "measured")]
    return size, hand, fixed, ratios[0], measured, ratios[1]


def make_system(size: int, dtype: str) -> tuple[Any, Any]:
    """Features and weights of a logistic Hessian, or the diagonals of a banded matrix."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    b = jax.random.normal(keys[0], (size,), dtype)
    if size > LARGEST_DENSE:
        return (jax.random.uniform(keys[1], (size,), dtype, 3.0, 30.0),), b
    features = jax.random.normal(keys[1], (2_000, size), dtype)
    weights = jax.nn.sigmoid(jax.random.normal(keys[2], (2_000,), dtype)) / 2_000
    return (features, weights), b


def product(system: Any, v: Any) -> Any:
    import jax.numpy as jnp

    if len(system) == 1:
        return system[0] * v - jnp.roll(v, 1) - jnp.roll(v, -1)
    features, weights = system
    return features.T @ (weights * (features @ v)) + 1e-3 * v


def handwritten(matvec: Callable, b: Any, rtol: float, max_steps: int) -> Any:
    """Conjugate gradients as one writes them down: no outcome, no residual."""
    import jax
    import jax.numpy as jnp

    def step(carry: tuple) -> tuple:
        v, r, p, rr, k = carry
        q = matvec(p)
        alpha = rr / (p @ q)
        v, r = v + alpha * p, r - alpha * q
        new_rr = r @ r
        return v, r, r + new_rr / rr * p, new_rr, k + 1

    rr = b @ b
    start = (jnp.zeros_like(b), b, b, rr, 0)
    goes_on: Callable = lambda c: (c[3] > rtol**2 * rr) & (c[4] < max_steps)
    return jax.lax.while_loop(goes_on, step, start)[0]


def compile_time(name: str, dtype: str) -> float:
    """CPU seconds for one solver, in this process, after another program has compiled."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", dtype == "float64")
    solve = build(name)
    system, b = make_system(100, dtype)
    jax.block_until_ready(jax.jit(lambda x: jnp.sum(x) + 1)(b))
    began = time.process_time()
    jax.jit(lambda system, b: solve(lambda v: product(system, v), b)).lower(system, b).compile()
    return time.process_time() - began


def build(name: str) -> Callable:
    """`matvec, b -> v` by the solver of that name."""
    import jax
    import lineax as lx

    import bilevax as bx

    library, _, method = name.partition(" ")
    if library == "hand-written":
        return lambda matvec, b: handwritten(matvec, b, 1e-4, 1_000)
    if library == "bilevax":
        solver = getattr(bx, method)()
        return lambda matvec, b: solver.solve(matvec, b).value
    if library == "jax.scipy":
        return lambda matvec, b: jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-4)[0]

    def by_lineax(matvec: Callable, b: Any) -> Any:
        operator = lx.FunctionLinearOperator(
            matvec, jax.eval_shape(lambda: b), lx.positive_semidefinite_tag
        )
        return lx.linear_solve(operator, b, lx.CG(1e-4, 1e-4)).value

    return by_lineax


if __name__ == "__main__":
    main()
