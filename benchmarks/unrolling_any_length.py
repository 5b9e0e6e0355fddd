"""What does exact unrolling keep, and what does it cost, at 100,000 steps and on a network?"""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from _common import arguments, print_header, print_table, race

import bilevax as bx

# A program that would need more than this is compiled and weighed, not run.
MOST_BYTES = 6e9


class Case(NamedTuple):
    """An inner problem, its optimiser, and what the outer objective sees."""

    title: str
    inner: Callable
    outer: Callable
    x0: Any
    theta: Any
    optimizer: optax.GradientTransformation
    num_steps: int
    is_momentum: bool

    @property
    def carry_bytes(self) -> int:
        """The size of x and the optimiser's state."""
        leaves = jax.tree.leaves((self.x0, self.optimizer.init(self.x0)))
        return sum(leaf.nbytes for leaf in leaves)


def main() -> None:
    args = arguments(__doc__ or "")
    jax.config.update("jax_enable_x64", True)
    print_header(__doc__ or "")
    print("Working memory of the compiled program, in carries (x and the optimiser's state) and")
    print("as a part of 4 sqrt(K) carries; CPU time relative to the derivative of a plain scan.\n")
    rounds = args.rounds or (1 if args.quick else 5)
    for case in (
        least_squares(400 if args.quick else 100_000, momentum=False),
        least_squares(400 if args.quick else 100_000, momentum=True),
        network(20 if args.quick else 2_000, 8 if args.quick else 128),
    ):
        measure(case, rounds)


def measure(case: Case, rounds: int) -> None:
    """One table."""
    size = case.carry_bytes
    bound = 4 * case.num_steps**0.5
    print(f"{case.title}: K = {case.num_steps:,}, a carry has {size / 1e3:,.1f} kB\n")
    compiled, memory = {}, {}
    for name, fn in programs(case).items():
        program = jax.jit(fn).lower(case.theta).compile()
        memory[name] = program.memory_analysis().temp_size_in_bytes
        if memory[name] < MOST_BYTES:
            compiled[name] = program
    timings = race({n: lambda p=p: p(case.theta) for n, p in compiled.items()}, rounds)
    plain = "plain scan" if "plain scan" in timings else "bx.Unrolled(), 'sqrt'"
    exact = compiled[plain](case.theta)[1]
    rows = []
    for name, num_bytes in memory.items():
        row = [name, f"{num_bytes / 1e6:,.2f}", f"{num_bytes / size:,.0f}"]
        row.append(f"{num_bytes / size / bound:.2f}")
        if name in compiled:
            grad = compiled[name](case.theta)[1]
            gap = jnp.linalg.norm(grad - exact) / jnp.linalg.norm(exact)
            row += [f"{timings[name].ratio(timings[plain], 'cpu'):.2f}", f"{float(gap):.0e}"]
        else:
            row += ["not run", "-"]
        rows.append(row)
    header = ("derivative", "MB", "carries", "of 4 sqrt(K)", f"time / {plain}", "difference")
    print_table(header, rows)


def programs(case: Case) -> dict[str, Callable]:
    """Every way to the value and the hypergradient after exactly K steps."""
    problem = bx.Bilevel(case.inner, case.outer)
    descent = bx.Descent(case.optimizer, num_steps=case.num_steps)

    def unrolled(checkpoints: Any) -> Callable:
        def run(theta: Any) -> Any:
            rule = bx.Unrolled(checkpoints=checkpoints)
            estimate, _ = bx.hypergradient(
                problem, case.x0, theta, inner_solver=descent, rule=rule, throw=False
            )
            return estimate.value, estimate.grad

        return run

    def after_scan(theta: Any) -> Any:
        def step(carry: Any, _: Any) -> tuple:
            x, state = carry
            updates, state = case.optimizer.update(jax.grad(case.inner)(x, theta), state, x)
            return (optax.apply_updates(x, updates), state), None

        start = (case.x0, case.optimizer.init(case.x0))
        (x, _), _ = jax.lax.scan(step, start, length=case.num_steps)
        return case.outer(x, theta)

    def after_optimistix(theta: Any) -> Any:
        solution = optx.minimise(
            case.inner,
            optx.OptaxMinimiser(case.optimizer, rtol=0.0, atol=0.0),
            case.x0,
            args=theta,
            max_steps=case.num_steps,
            adjoint=optx.RecursiveCheckpointAdjoint(),
            throw=False,
        )
        return case.outer(solution.value, theta)

    few = max(round(case.num_steps**0.5 / 4), 2)
    budget = int(case.carry_bytes * (2 * few + 40))
    out = {
        "plain scan": jax.value_and_grad(after_scan),
        "Optimistix, RecursiveCheckpointAdjoint": jax.value_and_grad(after_optimistix),
        "bx.Unrolled(), 'sqrt'": unrolled("sqrt"),
        "'all'": unrolled("all"),
        f"{few} checkpoints": unrolled(few),
        f"MemoryBudget({budget:,})": unrolled(bx.MemoryBudget(budget)),
    }
    if case.is_momentum:
        out["'reversible'"] = unrolled("reversible")
    return out


def least_squares(num_steps: int, momentum: bool) -> Case:
    """SGD on a hundred variables, a strength for each."""
    rng = np.random.default_rng(0)
    features, targets = jnp.asarray(rng.standard_normal((100, 100))), jnp.ones(100)

    def inner(x: Any, theta: Any) -> Any:
        misfit = 0.5 * jnp.mean((features @ x - targets) ** 2)
        return misfit + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

    return Case(
        title=f"SGD{' with momentum' if momentum else ''}, 100 variables, float64",
        inner=inner,
        outer=lambda x, theta: jnp.sum((x - 0.1) ** 2),
        x0=jnp.zeros(100),
        theta=jnp.full(100, -2.0),
        optimizer=optax.sgd(0.1, momentum=0.9 if momentum else None),
        num_steps=num_steps,
        is_momentum=momentum,
    )


def network(num_steps: int, width: int) -> Case:
    """Adam on a 784-128-10 network, one strength for each of its arrays."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    widths = (784, width, 10)
    images, labels = normal(64, 784), jnp.asarray(rng.integers(0, 10, 64))
    x0 = [(normal(a, b) / a**0.5, jnp.zeros(b, jnp.float32)) for a, b in pairwise(widths)]

    def cross_entropy(x: Any) -> Any:
        (first, bias), (second, shift) = x
        hidden = jnp.tanh(images @ first + bias)
        logits = hidden @ second + shift
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def inner(x: Any, theta: Any) -> Any:
        squares = jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)])
        return cross_entropy(x) + 0.5 * jnp.sum(jnp.exp(theta) * squares)

    return Case(
        title=f"Adam, 784-{width}-10 network, float32",
        inner=inner,
        outer=lambda x, theta: cross_entropy(x),
        x0=x0,
        theta=jnp.full(4, -5.0, jnp.float32),
        optimizer=optax.adam(1e-3, eps_root=1e-8),
        num_steps=num_steps,
        is_momentum=False,
    )


if __name__ == "__main__":
    sys.exit(main())
