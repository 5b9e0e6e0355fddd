"""How long do fifty warm-started outer steps take, the second time and from a cold process?"""

import json
import sys
from functools import partial

import numpy as np
from _common import (
    arguments,
    has,
    median,
    print_header,
    print_table,
    race_fresh,
)

NAMES = (
    "hand-written",
    "bilevax NewtonCG",
    "bilevax LBFGS",
    "optimistix LBFGS",
    "jaxopt LBFGS zoom",
    "jaxopt GradientDescent",
)


def main() -> None:
    args = arguments(__doc__ or "")
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]))))
        return
    print_header(__doc__ or "")
    num_steps, num_rounds = (3, 1) if args.quick else (50, args.rounds or 3)
    names = [name for name in NAMES if has(name.split()[0]) or name == "hand-written"]
    names = names[:2] if args.quick else names
    cases = {name: ("--child", name, str(num_steps)) for name in names}
    results = race_fresh(__file__, cases.values(), num_rounds)
    exact = np.asarray(reference(num_steps))
    rows = []
    for name, case in cases.items():
        rounds, base = results[case], results[cases["hand-written"]]
        theta = np.asarray(rounds[0]["theta"])
        rows.append(
            (
                name,
                1e3 * median(rounds, "second_wall"),
                median(rounds, "second_cpu") / median(base, "second_cpu"),
                median(rounds, "wall"),
                median(rounds, "cpu"),
                float(np.linalg.norm(theta - exact) / np.linalg.norm(exact)),
                rounds[0]["work"],
            )
        )
    print(f"{num_steps} Adam steps on theta, logistic regression, n = 2,000, d = 100, float32;")
    print("x and v start from the last step where the library can; float64 is the truth.\n")
    header = ("outer loop", "second call, ms", "CPU ratio", "process wall, s", "process CPU, s")
    print_table((*header, "error of theta", "Hessian products"), rows)


def measure(name: str, num_steps: int) -> dict:
    """Two runs in this process: the first compiles."""
    import time

    run = loop(name, num_steps)
    run()
    wall, cpu = [], []
    for _ in range(5):
        began, began_cpu = time.perf_counter(), time.process_time()
        theta, work = run()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return {
        "second_wall": float(np.median(wall)),
        "second_cpu": float(np.median(cpu)),
        "theta": np.asarray(theta, float).tolist(),
        "work": work,
    }


def loop(name: str, num_steps: int):
    """A function that makes all outer steps and returns theta and the Hessian products."""
    import jax
    from _logistic import Sizes, inner, make_data, outer

    train, validation, theta = make_data(Sizes(2_000, 100, 500), "float32")
    train, validation, theta = jax.device_put((train, validation, theta))
    x0 = 0 * theta
    library, _, method = name.partition(" ")
    if library == "bilevax":
        import optax

        import bilevax as bx

        problem = bx.Bilevel(inner, outer, train, validation)
        solver = getattr(bx, method)()
        double_loop = bx.DoubleLoop(solver, optimizer=optax.adam(0.1))

        def run():
            solution = bx.solve(
                problem, x0, theta, double_loop, num_steps=num_steps, progress=False
            )
            return solution.theta, solution.stats["num_hessian_products"]

        return run

    compiled = jax.jit(partial(_scan(library, method), num_steps=num_steps))

    def run_compiled():
        theta_end, work = jax.block_until_ready(compiled(theta, x0, train, validation))
        return theta_end, int(work) or None

    return run_compiled


def _scan(library: str, method: str):
    """All steps in one compiled scan: the fastest that a user can write by hand."""
    import _libraries as libraries
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adam(0.1)
    # the accuracy that bilevax has by default on this problem
    tolerance, rtol = 6e-6, 1e-4
    if library == "hand-written":
        hypergradient = partial(libraries.handwritten_hypergradient, tolerance=tolerance, rtol=rtol)
    elif library == "optimistix":
        program = libraries.optimistix(method, 1e-2, 1e-5, 1e-5)
    else:
        program = libraries.jaxopt(method, 0.3 * tolerance, 0.3 * rtol)

    def scan(theta, x0, train, validation, num_steps):
        def step(carry, _):
            theta, x, v, state = carry
            if library == "hand-written":
                _, grad, x, v, count = hypergradient(theta, x, v, train, validation)
            else:
                _, grad, x, _ = program(theta, x, train, validation)
                count = jnp.asarray(0, jnp.int32)
            updates, state = optimizer.update(grad, state)
            return (optax.apply_updates(theta, updates), x, v, state), count

        start = (theta, x0, jnp.zeros_like(x0), optimizer.init(theta))
        carry, counts = jax.lax.scan(step, start, length=num_steps)
        return carry[0], jnp.sum(counts)

    return scan


def reference(num_steps: int) -> np.ndarray:
    """Adam on the float64 hypergradient of the NumPy version."""
    from _logistic import Sizes, make_data, numpy_hypergradient

    train, validation, theta = make_data(Sizes(2_000, 100, 500), "float32")
    train, validation = ([a.astype(float) for a in level] for level in (train, validation))
    theta = theta.astype(float)
    x, v, first, second = None, None, np.zeros_like(theta), np.zeros_like(theta)
    for k in range(1, num_steps + 1):
        solution = numpy_hypergradient(train, validation, theta, 1e-10, 1e-8, x, v)
        x, v = solution.x, solution.v
        first = 0.9 * first + 0.1 * solution.grad
        second = 0.999 * second + 0.001 * solution.grad**2
        size = np.sqrt(second / (1 - 0.999**k)) + 1e-8
        theta = theta - 0.1 * first / (1 - 0.9**k) / size
    return theta


if __name__ == "__main__":
    sys.exit(main())
