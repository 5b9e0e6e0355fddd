"""Time and memory of rules, compiled once and timed in turn."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..._hypergradient._base import AbstractHypergradient, Query
from ..._inner._base import AbstractInnerSolver
from ..._problem import Bilevel, start_at

_MOST_SECONDS = 4.0  # of timing, for all programs together
_FEWEST_ROUNDS = 3


class Program(NamedTuple):
    """A compiled function of no arguments, its peak memory, and what it once returned."""

    call: Callable[[], Any]
    memory_bytes: int
    output: Any


def compile_forward(
    problem: Bilevel, solver: AbstractInnerSolver, x0: PyTree, theta: PyTree
) -> Program:
    """The inner solve alone."""

    def forward(problem: Bilevel, x0: PyTree, theta: PyTree) -> PyTree:
        start = start_at(x0, theta)
        state = solver.init(problem.inner, start, theta)
        return solver.solve(problem.inner, start, theta, state)[0].x

    return _compile(forward, problem, x0, theta)


def compile_rule(
    problem: Bilevel,
    solver: AbstractInnerSolver,
    rule: AbstractHypergradient,
    x0: PyTree,
    theta: PyTree,
) -> Program:
    """Inner solve and hypergradient: the gradient, the code of the result, the counts."""

    def whole(problem: Bilevel, x0: PyTree, theta: PyTree) -> tuple:
        query = Query(problem, solver, x0, theta)
        estimate, _ = rule.estimate(query, rule.init(query))
        return estimate.grad, estimate.result.index, estimate.stats

    return _compile(whole, problem, x0, theta)


def _compile(fn: Callable, *args: Any) -> Program:
    arrays, static = eqx.partition(args, eqx.is_array)
    # Arrays as arguments: as constants the data would be folded into the program.
    compiled = jax.jit(lambda arrays: fn(*eqx.combine(arrays, static))).lower(arrays).compile()
    analysis = compiled.memory_analysis()  # a backend may not say
    memory = 0 if analysis is None else analysis.temp_size_in_bytes
    return Program(lambda: compiled(arrays), memory, jax.block_until_ready(compiled(arrays)))


def time_in_turn(programs: dict[Any, Program], num_rounds: int) -> dict[Any, float]:
    """The median seconds of each; all in every round, so that a busy moment meets all."""
    seconds: dict[Any, list[float]] = {key: [] for key in programs}
    began, keys = time.perf_counter(), list(programs)
    for k in range(num_rounds):
        first = k % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            start = time.perf_counter()
            jax.block_until_ready(programs[key].call())
            seconds[key].append(time.perf_counter() - start)
        if k + 1 >= _FEWEST_ROUNDS and time.perf_counter() - began > _MOST_SECONDS:
            break
    return {key: statistics.median(times) for key, times in seconds.items()}
