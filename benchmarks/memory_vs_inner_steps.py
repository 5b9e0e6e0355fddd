"""How do memory and time of a hypergradient grow with the number of inner steps?"""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from _common import arguments, print_header, print_table, race

import bilevax as bx

WIDTHS = (16, 32, 32, 10)
NUM_TRUNCATED = 10
NUM_CG_STEPS = 10
# A program that would need more than this is compiled and weighed, not run.
MOST_BYTES = 500e6


def main() -> None:
    args = arguments(__doc__ or "")
    print_header(__doc__ or "")
    all_steps = (4,) if args.quick else (10, 100, 1_000, 10_000)
    parameters, data = make_network(20 if args.quick else 200)
    # log of the l2 strength of each layer, and of the learning rate
    theta = jnp.array([-6.0, -6.0, -6.0, -3.0])
    rows: dict[str, list[Any]] = {}
    for num_steps in all_steps:
        weigh(rows, num_steps, parameters, data, theta, args.rounds or (1 if args.quick else 3))
    carry = 2 * sum(a.nbytes for a in jax.tree.leaves(parameters)) / 1e3
    print(f"SGD with momentum on a small network, carry {carry:.1f} kB, four outer variables,")
    print("float32. Megabytes of working memory / seconds in units of the K steps alone.\n")
    header = ("rule", *(f"K = {k:,}" for k in all_steps))
    print_table(header, [(name, *cells) for name, cells in rows.items()])


def weigh(
    rows: dict[str, list[Any]], num_steps: int, parameters: Any, data: Any, theta: Any, rounds: int
) -> None:
    """One column of the table."""
    programs = {}
    for name, fn in hypergradients(num_steps, parameters, data).items():
        compiled = jax.jit(fn).lower(theta).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        programs[name] = compiled, size
    # a long program is its own average
    rounds = 1 if num_steps >= 10_000 else rounds
    cases = {
        name: lambda compiled=compiled: compiled(theta)
        for name, (compiled, size) in programs.items()
        if size < MOST_BYTES
    }
    timings = race(cases, rounds)
    for name, (_, size) in programs.items():
        factor = "not run"
        if name in timings:
            factor = f"{timings[name].ratio(timings['K steps alone'], 'cpu'):.1f}"
        rows.setdefault(name, []).append(f"{size / 1e6:.2f} / {factor}")


def hypergradients(num_steps: int, parameters: Any, data: Any) -> dict[str, Callable]:
    """Every way to the hypergradient of the validation loss after `num_steps` steps."""
    train, validation = data
    problem = bx.Bilevel(inner, outer, train, validation)
    descent = bx.Descent(optimizer, num_steps=num_steps)

    def by_rule(rule: Any) -> Callable:
        def run(theta: Any) -> Any:
            estimate, _ = bx.hypergradient(
                problem, parameters, theta, inner_solver=descent, rule=rule, throw=False
            )
            return estimate.value, estimate.grad

        return run

    def after_scan(theta: Any) -> Any:
        update = optimizer(theta)

        def step(carry: Any, _: Any) -> tuple:
            x, state = carry
            updates, state = update.update(jax.grad(inner)(x, theta, train), state)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (parameters, update.init(parameters)), length=num_steps)
        return outer(x, theta, validation)

    def after_optimistix(theta: Any) -> Any:
        solver = optx.OptaxMinimiser(optimizer(theta), rtol=0.0, atol=0.0)
        solution = optx.minimise(
            lambda x, theta: inner(x, theta, train),
            solver,
            parameters,
            args=theta,
            max_steps=num_steps,
            adjoint=optx.RecursiveCheckpointAdjoint(),
            throw=False,
        )
        return outer(solution.value, theta, validation)

    return {
        "K steps alone": after_scan,
        "hand-written scan": jax.value_and_grad(after_scan),
        "Optimistix, RecursiveCheckpointAdjoint": jax.value_and_grad(after_optimistix),
        "bx.Unrolled(checkpoints='all')": by_rule(bx.Unrolled(checkpoints="all")),
        "bx.Unrolled()": by_rule(bx.Unrolled()),
        f"bx.Truncated, last {NUM_TRUNCATED} or K / 2": by_rule(
            bx.Truncated(min(NUM_TRUNCATED, num_steps // 2))
        ),
        f"bx.Implicit(bx.linear.CG(num_steps={NUM_CG_STEPS}))": by_rule(
            bx.Implicit(bx.linear.CG(num_steps=NUM_CG_STEPS), inexact=True)
        ),
    }


def optimizer(theta: Any) -> optax.GradientTransformation:
    return optax.sgd(jnp.exp(theta[3]), momentum=0.9)


def inner(x: Any, theta: Any, data: Any) -> Any:
    """Cross entropy, and an l2 strength for each layer."""
    squares = jnp.stack([jnp.sum(weights**2) for weights, _ in x])
    return _cross_entropy(x, data) + 0.5 * jnp.sum(jnp.exp(theta[:3]) * squares)


def outer(x: Any, theta: Any, data: Any) -> Any:
    del theta
    return _cross_entropy(x, data)


def _cross_entropy(x: Any, data: Any) -> Any:
    h, labels = data
    for k, (weights, bias) in enumerate(x):
        h = h @ weights + bias[None, :]
        h = jnp.tanh(h) if k < len(x) - 1 else h
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h, labels))


def make_network(num_samples: int) -> tuple[Any, Any]:
    """First parameters, and training and validation data, float32."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    layers = list(pairwise(WIDTHS))
    parameters = [(normal(a, b) / a**0.5, jnp.zeros(b, jnp.float32)) for a, b in layers]
    teacher = normal(WIDTHS[0], WIDTHS[-1])
    inputs = normal(2, num_samples, WIDTHS[0])
    labels = jnp.argmax(inputs @ teacher, axis=-1)
    return parameters, tuple(zip(inputs, labels, strict=True))


if __name__ == "__main__":
    sys.exit(main())
