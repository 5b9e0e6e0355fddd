"""Ten thousand random problems: right, or flagged. `python tests/many_random_problems.py [n]`

Each family draws problems as data of one function, so that a size compiles once for each
solver. An answer is wrong if its outcome is successful and its relative error above
`WRONG`; a false alarm is a flag on an answer that is right to `RIGHT`.
"""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import bilevax as bx

WRONG, RIGHT = 1e-2, 1e-4
SOLVERS = {
    "default": None,
    "NewtonCG": bx.NewtonCG(dense=False),
    "LBFGS": bx.LBFGS(),
    "optx.BFGS": optx.BFGS(1e-8, 1e-8),
}


class Case(NamedTuple):
    """A problem, where to start, and its answer; `None` where there is none."""

    problem: bx.Bilevel
    x0: Any
    theta: Any
    exact: np.ndarray | None


def convex(x, theta, data):
    y = data["unit"] * x
    t = data["c"] @ y - theta[0]
    loss = jnp.abs(t) + jnp.log1p(jnp.exp(-2 * jnp.abs(t)))
    return 0.5 * y @ (data["A"] @ y) + jnp.sum(loss) + y @ (data["B"] @ theta)


def distance(x, theta, data):
    y = data["unit"] * x
    return 0.5 * jnp.sum((y - data["target"]) ** 2) + jnp.sum(jnp.sin(y)) + jnp.sum(theta**2)


def draw_convex(rng, size: int, log_units: float, log_condition: float) -> Case:
    """Strongly convex; variables in units of their own; a start anywhere."""
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    A = (q * 10.0 ** rng.uniform(-log_condition, 0, size)) @ q.T
    A = (A + A.T) / 2
    B, c = rng.normal(size=(size, 3)), rng.normal(size=(4, size)) / np.sqrt(size)
    target, theta = rng.normal(size=size), rng.normal(size=3)
    y = np.zeros(size)
    for _ in range(100):
        u = np.tanh(c @ y - theta[0])
        hessian = A + (c.T * (1 - u**2)) @ c
        step = np.linalg.solve(hessian, A @ y + c.T @ u + B @ theta)
        length = 1.0
        while _value(A, B, c, theta, y - length * step) > _value(A, B, c, theta, y):
            length /= 2
            if length < 1e-10:
                break
        y = y - length * step
        if np.linalg.norm(step) < 1e-13 * np.linalg.norm(y):
            break
    u = np.tanh(c @ y - theta[0])
    hessian, cross = A + (c.T * (1 - u**2)) @ c, B.copy()
    cross[:, 0] -= c.T @ (1 - u**2)
    exact = 2 * theta - cross.T @ np.linalg.solve(hessian, y - target + np.cos(y))
    unit = 10.0 ** rng.uniform(-log_units, log_units, size)
    data = {"A": A, "B": B, "c": c, "unit": unit, "target": target}
    data = {name: jnp.asarray(value) for name, value in data.items()}
    x0 = jnp.asarray(10.0 ** rng.uniform(-2, 2) * rng.normal(size=size) / unit)
    return Case(bx.Bilevel(convex, distance, data, data), x0, jnp.asarray(theta), exact)


def _value(A, B, c, theta, y):
    t = np.abs(c @ y - theta[0])
    return y @ A @ y / 2 + np.sum(t + np.log1p(np.exp(-2 * t))) + y @ (B @ theta)


def barrier(x, theta, data):
    return jnp.sum(theta * data["c"] * x - data["weight"] * jnp.log(x))


def logarithms(x, theta, data):
    return jnp.sum(data["target"] * jnp.log(x)) + jnp.sum(theta**2)


def draw_barrier(rng, size: int) -> Case:
    """`x* = weight / (theta c)`, many orders of magnitude below or above the start."""
    data = {
        "c": jnp.asarray(10.0 ** rng.uniform(-1, 1, size)),
        "weight": jnp.asarray(10.0 ** rng.uniform(-8, 1, size)),
        "target": jnp.asarray(rng.normal(size=size)),
    }
    theta = jnp.asarray(rng.uniform(0.5, 2.0))
    exact = 2 * theta - jnp.sum(data["target"]) / theta
    x0 = jnp.asarray(10.0 ** rng.uniform(-1, 1, size))
    return Case(bx.Bilevel(barrier, logarithms, data, data), x0, theta, np.asarray(exact))


def valley(x, theta, data):
    return 0.5 * jnp.sum((data["R"] @ x - data["S"] @ theta - data["b"]) ** 2)


def distance_to_target(x, theta, data):
    return 0.5 * jnp.sum((x - data["target"]) ** 2) + jnp.sum(theta**2)


def draw_singular(rng, size: int) -> Case:
    """Rank-deficient least squares: the solution nearest to the start."""
    rank = int(rng.integers(1, size))
    R = rng.normal(size=(rank, size)) * 10.0 ** rng.uniform(-1, 1, (rank, 1))
    mix, _ = np.linalg.qr(rng.normal(size=(size, size)))
    R = mix[:, :rank] @ R
    S, b = R @ rng.normal(size=(size, 2)), R @ rng.normal(size=size)
    x0, theta, target = rng.normal(size=size), rng.normal(size=2), rng.normal(size=size)
    inverse = np.linalg.pinv(R, rcond=1e-10)
    x = x0 + inverse @ (S @ theta + b - R @ x0)
    exact = 2 * theta + (inverse @ S).T @ (x - target)
    data = {"R": R, "S": S, "b": b, "target": target}
    data = {name: jnp.asarray(value) for name, value in data.items()}
    problem = bx.Bilevel(valley, distance_to_target, data, data)
    return Case(problem, jnp.asarray(x0), jnp.asarray(theta), exact)


def quadratic(x, theta, data):
    return 0.5 * x @ (data["A"] @ x) + x @ (data["B"] @ theta)


def draw_indefinite(rng, size: int) -> Case:
    """No minimum."""
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    eigenvalues = 10.0 ** rng.uniform(-2, 0, size)
    eigenvalues[: int(rng.integers(1, size + 1))] *= -1
    A = (q * eigenvalues) @ q.T
    data = {"A": (A + A.T) / 2, "B": rng.normal(size=(size, 2)), "target": rng.normal(size=size)}
    data = {name: jnp.asarray(value) for name, value in data.items()}
    problem = bx.Bilevel(quadratic, distance_to_target, data, data)
    return Case(problem, jnp.asarray(rng.normal(size=size)), jnp.asarray(rng.normal(size=2)), None)


def lasso(x, theta, data):
    strength = jnp.exp(theta[0])
    return jnp.sum(0.5 * data["h"] * (x - theta[1] * data["b"]) ** 2 + strength * jnp.abs(x))


def draw_kinked(rng, size: int) -> Case:
    """A lasso with a diagonal Hessian; no answer where a coefficient is zero."""
    h, b, target = rng.uniform(0.5, 2, size), rng.normal(size=size), rng.normal(size=size)
    theta = np.array([rng.uniform(-6, 0), rng.uniform(0.5, 2)])
    shift = np.exp(theta[0]) / h
    y = theta[1] * b
    x = np.sign(y) * np.maximum(np.abs(y) - shift, 0)
    exact = None
    if np.all(x != 0):
        move = np.stack([-np.sign(y) * shift, b])
        exact = 2 * theta + move @ (x - target)
    data = {name: jnp.asarray(a) for name, a in (("h", h), ("b", b), ("target", target))}
    problem = bx.Bilevel(lasso, distance_to_target, data, data)
    return Case(problem, jnp.asarray(rng.normal(size=size)), jnp.asarray(theta), exact)


def equation(x, theta, data):
    return data["A"] @ x + data["s"] * jnp.sin(x) - data["B"] @ theta


def fixed_point(x, theta, data):
    return x - equation(x, theta, data)


def draw_equation(rng, size: int, kind: type) -> Case:
    """A monotone equation; as a fixed point it contracts, or does not."""
    skew = rng.normal(size=(size, size))
    A = np.eye(size) * rng.uniform(0.5, 3) + (skew - skew.T) * rng.uniform(0, 1) / np.sqrt(size)
    s, B = rng.uniform(0, 0.3), rng.normal(size=(size, 2))
    theta, target = rng.normal(size=2), rng.normal(size=size)
    x = np.linalg.solve(A, B @ theta)
    for _ in range(100):
        jacobian = A + s * np.diag(np.cos(x))
        x = x - np.linalg.solve(jacobian, A @ x + s * np.sin(x) - B @ theta)
    jacobian = A + s * np.diag(np.cos(x))
    exact = 2 * theta + (np.linalg.solve(jacobian, B)).T @ (x - target)
    data = {name: jnp.asarray(a) for name, a in (("A", A), ("s", s), ("B", B), ("target", target))}
    condition = kind(equation if kind is bx.Root else fixed_point, data)
    problem = bx.Bilevel(condition, distance_to_target, outer_data=data)
    return Case(problem, jnp.asarray(rng.normal(size=size)), jnp.asarray(theta), exact)


def families() -> Iterator[tuple[str, Callable[[Any], Case], list[str], float]]:
    """Name, draw, solvers, and the share of all problems."""
    small, large = ["default", "LBFGS", "optx.BFGS"], ["default", "LBFGS"]
    for size in (1, 3, 12):
        yield f"convex {size}", lambda r, n=size: draw_convex(r, n, 0, r.uniform(0, 6)), small, 3
        yield f"units {size}", lambda r, n=size: draw_convex(r, n, 8, r.uniform(0, 4)), small, 3
        yield f"barrier {size}", lambda r, n=size: draw_barrier(r, n), [*small, "NewtonCG"], 3
        yield f"kinked {size}", lambda r, n=size: draw_kinked(r, n), small[:2], 3
        yield f"root {size}", lambda r, n=size: draw_equation(r, n, bx.Root), small, 2
        yield f"fixed {size}", lambda r, n=size: draw_equation(r, n, bx.FixedPoint), small, 2
    for size in (3, 12, 40):
        yield f"singular {size}", lambda r, n=size: draw_singular(r, n), small[:2], 3
        yield f"indefinite {size}", lambda r, n=size: draw_indefinite(r, n), small[:2], 2
    for size in (40, 300):
        yield f"convex {size}", lambda r, n=size: draw_convex(r, n, 0, r.uniform(0, 2)), large, 2
        yield f"units {size}", lambda r, n=size: draw_convex(r, n, 1, r.uniform(0, 1)), large, 2
        yield f"barrier {size}", lambda r, n=size: draw_barrier(r, n), large, 1
    yield "convex 1000", lambda r: draw_convex(r, 1000, 0, r.uniform(0, 2)), ["default"], 0.1


def judge(case: Case, solver: Any) -> tuple[str, float]:
    estimate, _ = bx.hypergradient(
        case.problem, case.x0, case.theta, inner_solver=solver, throw=False
    )
    is_claimed = bool(estimate.result == bx.RESULTS.successful)
    if case.exact is None:
        return ("wrong" if is_claimed else "flagged"), np.inf
    size = max(np.linalg.norm(case.exact), 1e-6)
    error = float(np.linalg.norm(np.asarray(estimate.grad) - case.exact) / size)
    if is_claimed:
        return ("right" if error <= WRONG else "wrong"), error
    return ("false alarm" if error <= RIGHT else "flagged"), error


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    all_families = [f for f in families() if f[0].startswith(only)]
    weight = sum(share * len(names) for _, _, names, share in all_families)
    began, sums = time.perf_counter(), Counter()
    for name, draw, names, share in all_families:
        num = max(1, round(total * share / weight))
        for solver in names:
            seen = Counter()
            for seed in range(num):
                case = draw(np.random.default_rng([seed, len(name), ord(name[0])]))
                verdict, error = judge(case, SOLVERS[solver])
                seen[verdict] += 1
                if verdict == "wrong":
                    print(f"  wrong: {name}, {solver}, seed {seed}, relative error {error:.1e}")
            sums += seen
            print(f"{name:15s} {solver:10s} {dict(seen)}", flush=True)
    answered = sums["right"] + sums["false alarm"]
    print(f"{sum(sums.values())} solves in {time.perf_counter() - began:.0f} s: {dict(sums)}")
    print(f"right answers that were flagged: {100 * sums['false alarm'] / max(answered, 1):.1f} %")
    sys.exit(sums["wrong"] > 0)


if __name__ == "__main__":
    main()
