"""What every rule costs on one problem, and how right it is."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree
from tqdm import tqdm

import bilevax as bx

# The number K of gradient steps, for the solution as for the linear system.
NUM_STEPS = 100
NUM_TRUNCATED = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule from one start. Memory is what the compiled program needs besides its input."""

    rule: str
    start: str
    error: float
    seconds: float
    megabytes: float
    gradients: int
    hessian_products: int
    cross_products: int


def measure_costs(
    problem: bx.Bilevel,
    x0: PyTree,
    theta: Array,
    theta_before: Array,
    num_steps: int = NUM_STEPS,
    num_repeats: int = 3,
) -> list[Row]:
    """One row for every rule, cold and warm.

    Cold starts from `x0` and no adjoint vector, warm from what the same rule left behind at
    `theta_before`, one outer step away.
    """
    exact, _ = bx.hypergradient(
        problem,
        x0,
        theta,
        inner_solver=bx.NewtonCG(rtol=1e-11),
        rule=bx.Implicit(bx.linear.CG(1e-11)),
    )
    step_size = 1.0 / float(largest_eigenvalue(problem, exact.x, theta))
    cases = rules(step_size, num_steps)
    programs, states = [], []
    bar = tqdm(total=len(cases) * (2 + num_repeats), desc="cost table", disable=None, leave=False)
    for _, solver, rule in cases:
        program, cold = _compile(problem, x0, theta, solver, rule)
        _, warm = program(problem, theta_before, cold)
        programs.append(program)
        states.append({"cold": cold, "warm": warm})
        bar.update(2)
    # Interleaved, so that a busy moment of the machine meets every rule.
    seconds: dict[tuple[int, str], list[float]] = {}
    estimates: dict[tuple[int, str], bx.Estimate] = {}
    for _ in range(num_repeats):
        for k, program in enumerate(programs):
            for start, state in states[k].items():
                began = time.perf_counter()
                estimates[k, start], _ = jax.block_until_ready(program(problem, theta, state))
                seconds.setdefault((k, start), []).append(time.perf_counter() - began)
            bar.update(1)
    bar.close()
    return [
        _row(cases[k][0], start, estimate, exact, seconds[k, start], programs[k])
        for (k, start), estimate in estimates.items()
    ]


def rules(step_size: float, num_steps: int) -> list[tuple[str, Any, Any]]:
    """Name, inner solver and rule of every case.

    The first six take the same K gradient steps for x, so that only the derivative
    differs; the last two solve both systems to a tolerance.
    """
    k, last = num_steps, min(NUM_TRUNCATED, num_steps // 2)
    descent = bx.Descent(optax.sgd(step_size), num_steps=k)
    descent_adjoint = bx.linear.GradientDescent(step_size, num_steps=k)
    return [
        (f"unrolled, {k} steps, all kept", descent, bx.Unrolled(checkpoints="all")),
        (f"unrolled, {k} steps", descent, bx.Unrolled()),
        (f"truncated, last {last} of {k}", descent, bx.Truncated(last)),
        (f"one-step, after {k}", descent, bx.OneStep()),
        (f"implicit, {k} steps + descent {k}", descent, bx.Implicit(descent_adjoint, inexact=True)),
        (
            f"implicit, {k} steps + CG {last}",
            descent,
            bx.Implicit(bx.linear.CG(num_steps=last), inexact=True),
        ),
        (
            "implicit, Newton-CG + descent, 1e-2",
            bx.NewtonCG(1e-3),
            bx.Implicit(bx.linear.GradientDescent(step_size, 1e-2)),
        ),
        ("implicit, Newton-CG + CG, 1e-2", bx.NewtonCG(1e-3), bx.Implicit(bx.linear.CG(1e-2))),
        ("implicit, Newton-CG + CG, 1e-6", bx.NewtonCG(1e-7), bx.Implicit(bx.linear.CG(1e-6))),
    ]


def largest_eigenvalue(problem: bx.Bilevel, x: PyTree, theta: Array) -> Array:
    """Of the Hessian of the inner objective, by the power method (from below, by per cents)."""

    @eqx.filter_jit
    def run(problem: bx.Bilevel, x: PyTree, theta: Array) -> Array:
        _, product = jax.linearize(lambda x: problem.inner.residual(x, theta), x)

        def step(_: int, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            v = product(carry[0])
            size = jnp.sqrt(sum(jnp.vdot(a, a) for a in jtu.tree_leaves(v)))
            return jtu.tree_map(lambda a: a / size, v), size

        start = jtu.tree_map(
            lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), x
        )
        return jax.lax.fori_loop(0, 30, step, (start, jnp.zeros((), theta.dtype)))[1]

    return 1.02 * run(problem, x, theta)


def _compile(
    problem: bx.Bilevel, x0: PyTree, theta: Array, solver: Any, rule: Any
) -> tuple[Callable, Any]:
    """The compiled hypergradient `(problem, theta, state)`, and its cold state."""

    def estimate(problem: bx.Bilevel, theta: Array, state: Any) -> tuple[bx.Estimate, Any]:
        return bx.hypergradient(
            problem, x0, theta, inner_solver=solver, rule=rule, state=state, throw=False
        )

    # The shapes of a state without computing one; x0 and the rest of a cold one are zero.
    struct = eqx.filter_eval_shape(estimate, problem, theta, None)[1]
    cold = jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), struct)
    jitted: Any = eqx.filter_jit(estimate)
    return jitted.lower(problem, theta, cold).compile(), cold


def _row(
    name: str,
    start: str,
    estimate: bx.Estimate,
    exact: bx.Estimate,
    seconds: list[float],
    program: Any,
) -> Row:
    difference = np.linalg.norm(estimate.grad - exact.grad) / np.linalg.norm(exact.grad)
    return Row(
        rule=name,
        start=start,
        error=float(difference),
        seconds=float(np.median(seconds)),
        megabytes=program.compiled.memory_analysis().temp_size_in_bytes / 1e6,
        gradients=int(estimate.stats["num_gradients"]),
        hessian_products=int(estimate.stats["num_hessian_products"]),
        cross_products=int(estimate.stats["num_cross_products"]),
    )


HEADER = ("rule", "start", "error", "seconds", "MB", "grad", "Hessian", "cross")
READING = (
    "error    relative to an implicit hypergradient with both systems solved to 1e-11,",
    "         which gets small: so errors grow on the way to the best theta",
    "seconds  median; all rules take turns, compilation left out",
    "MB       working memory of the compiled program; that of unrolling grows with the steps, or",
    "         with their root where some are computed twice (the default)",
    "grad     gradients of the inner and outer objective; Hessian, cross: products with the",
    "         second derivatives; going back through a step counts as one gradient and one of each",
    "start    cold: from zero; warm: from the same rule's result one outer step before",
)


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of `HEADER`."""
    return (
        row.rule,
        row.start,
        f"{row.error:.1e}",
        f"{row.seconds:.3f}",
        f"{row.megabytes:.1f}",
        str(row.gradients),
        str(row.hessian_products),
        str(row.cross_products),
    )


def format_table(rows: list[Row]) -> str:
    """An aligned table, and how to read it."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", *READING])
