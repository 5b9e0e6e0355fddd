"""Persistent evolution strategies: unbiased over long episodes, a window at a time."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from ..._checks import check_positive
from ..._inner._base import AbstractInnerSolver, AbstractSteppingSolver, Counts, run
from ..._problem import Bilevel, is_start_function, start_at
from ..._results import RESULTS
from ..._tree import strong, tree_where, tree_zeros_like
from .._base import Estimate, HypergradientState, Query
from ._perturb import (
    AbstractEvolution,
    as_sigma,
    check_rule_state,
    check_settings,
    draw,
    evolution_estimate,
    gradient_and_error,
    over_particles,
    perturbed,
)


class PersistentES(AbstractEvolution):
    """Evolution strategies over long inner solves, one window of steps at a time.

    An *episode* is the `N` steps of the inner solver from `x0(theta)`. Each estimate
    advances pairs of perturbed solves by a window of `num_steps` steps, under new
    perturbations `+- sigma z` of theta, and looks at the outer objective there:

        grad = mean over pairs of  xi (L(x+, theta + sigma z) - L(x-, theta - sigma z)) / (2 sigma)

    where `xi` is the sum of all `z` of the pair since the episode began: through it the
    influence of theta in *every* earlier window counts. At the end of an episode the next
    estimate starts again at `x0(theta)`, with `xi = 0`. The objective is the mean over the
    windows of an episode of `L(x at the end of the window, theta)`.

    **Arguments:**

    - `key`, `num_pairs`, `sigma`: as in `EvolutionStrategies`.
    - `num_steps`: the length of a window. It divides the number of steps of the inner
        solver, which has to be one with steps: `Descent` (`num_steps`), an Optimistix
        solver (`max_steps`).
    - `batch_size`: how many of the `2 num_pairs + 1` solves advance side by side; by
        default all.

    The solves live in the state: pass it on, as `solve` does. Where `x0` is a function of
    theta, use `solve`, since `bx.hypergradient(state=...)` replaces `x0`.
    `estimate.x` and `estimate.value` belong to an unperturbed solve, at the end of the
    window. `error_estimate` is the standard error over the pairs (`None` for one).

    **Cost:** `(2 num_pairs + 1) num_steps` inner steps an estimate; memory of
    `2 num_pairs + 1` carries. The variance grows with the number of entries of theta, and
    with the number of windows unless their perturbations matter equally.

    **Exact when** never; for constant theta the mean of the estimates of one episode is
    unbiased for the gradient of the smoothed objective. Where theta moves during an
    episode, the earlier windows belong to an older theta: keep the outer steps small.

    !!! example

        ```python
        import bilevax as bx, jax, jax.numpy as jnp, optax

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum(jnp.cosh(x - theta)),
            outer=lambda x, theta: jnp.sum((x - 0.5) ** 2),
        )
        method = bx.DoubleLoop(
            inner_solver=bx.Descent(optax.sgd(0.01), num_steps=1_000),
            hypergradient=bx.PersistentES(jax.random.key(0), num_pairs=16, num_steps=50),
            optimizer=optax.adam(0.01),
        )
        bx.solve(problem, jnp.zeros(3), jnp.zeros(3), method, num_steps=100)
        ```

    Reference: Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled
    computation graphs with persistent evolution strategies", 2021, algorithm 2.
    """

    key: Array
    num_pairs: int
    sigma: PyTree
    num_steps: int
    batch_size: int | None

    def __init__(
        self,
        key: Array,
        *,
        num_steps: int,
        num_pairs: int = 32,
        sigma: PyTree = 0.1,
        batch_size: int | None = None,
    ) -> None:
        check_settings(key, num_pairs, batch_size)
        check_positive(num_steps, "num_steps")
        self.key = key
        self.num_pairs = num_pairs
        self.sigma = as_sigma(sigma)
        self.num_steps = num_steps
        self.batch_size = batch_size

    def init(self, query: Query) -> HypergradientState:
        problem, inner_solver, x0, theta = query
        solver, _ = self._check_solver(inner_solver)
        x = start_at(x0, theta)
        sums = draw(self.key, self.num_pairs, theta)
        inner = solver.init(problem.inner, x, theta)
        carries, _ = self._begin(problem, solver, x0, theta, inner, self._all(sums))
        rule = _Episode(
            carries=carries,
            sums=tree_zeros_like(sums),
            window=jnp.asarray(0, jnp.int32),
            num_estimates=jnp.asarray(0, jnp.int32),
            x0=None if is_start_function(x0) else x,
        )
        return HypergradientState(x=x, v=None, inner=inner, rule=rule)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        problem, inner_solver, x0, theta = query
        solver, num_windows = self._check_solver(inner_solver)
        check_rule_state(self, state, _Episode)
        episode: _Episode = state.rule
        x0 = _start_of_episodes(episode, x0)
        # 1. new perturbations; at the beginning of an episode, new particles
        key = jax.random.fold_in(self.key, episode.num_estimates)
        directions = draw(key, self.num_pairs, theta)
        every_direction = self._all(directions)
        fresh, structure = self._begin(problem, solver, x0, theta, state.inner, every_direction)
        _check_same_particles(episode.carries, fresh)
        is_first = episode.window == 0
        carries = tree_where(is_first, fresh, episode.carries)
        before = tree_where(is_first, tree_zeros_like(episode.sums), episode.sums)
        sums = jtu.tree_map(jnp.add, before, directions)

        # 2. a window of steps for every particle
        def advance(particle: tuple) -> tuple:
            direction, leaves = particle
            moved = perturbed(theta, self.sigma, direction)
            carry = jtu.tree_unflatten(structure[0], leaves)
            carry, count = run(solver, problem.inner, moved, carry, self.num_steps)
            x, inner_state = solver.finish(problem.inner, carry)
            value, _ = problem.outer_value(x, moved)
            return jtu.tree_leaves(strong(carry)), value, x, inner_state, count

        carries, values, xs, inner_states, counts = over_particles(
            advance, (every_direction, carries), self.batch_size
        )
        # 3. the gradient; particle 0 is the unperturbed one
        plus, minus = values[1 : self.num_pairs + 1], values[self.num_pairs + 1 :]
        grad, error = gradient_and_error(sums, plus - minus, self.sigma)
        x, inner_state = jtu.tree_map(lambda a: a[0], (xs, inner_states))
        estimate = evolution_estimate(
            problem, x, theta, grad, error, Counts(gradients=jnp.sum(counts)), counts[0]
        )
        # A particle that is not finite stays so: the next estimate begins a new episode.
        goes_on = estimate.result == RESULTS.successful
        rule = _Episode(
            carries=carries,
            sums=sums,
            window=jnp.where(goes_on, (episode.window + 1) % num_windows, 0),
            num_estimates=episode.num_estimates + 1,
            x0=episode.x0,
        )
        return estimate, HypergradientState(x=x, v=None, inner=inner_state, rule=rule)

    def _check_solver(
        self, inner_solver: AbstractInnerSolver
    ) -> tuple[AbstractSteppingSolver, int]:
        """The solver, and the number of windows in an episode."""
        if not isinstance(inner_solver, AbstractSteppingSolver):
            raise TypeError(
                "`PersistentES` advances the steps of the inner solver, and "
                f"{type(inner_solver).__name__} has none that JAX can see. Use an inner solver "
                "such as bx.Descent(optimizer, num_steps=...), or bx.EvolutionStrategies(...)."
            )
        if inner_solver.max_steps % self.num_steps:
            raise ValueError(
                "An episode, the steps of the inner solver, must consist of whole windows; got "
                f"{inner_solver.max_steps} steps and PersistentES(num_steps={self.num_steps})."
            )
        return inner_solver, inner_solver.max_steps // self.num_steps

    def _all(self, directions: PyTree) -> PyTree:
        """The direction of every particle: none, the pairs' first ones, their second ones."""
        return jtu.tree_map(lambda z: jnp.concatenate([jnp.zeros_like(z[:1]), z, -z]), directions)

    def _begin(
        self,
        problem: Bilevel,
        solver: AbstractSteppingSolver,
        x0: PyTree,
        theta: PyTree,
        inner_state: PyTree,
        directions: PyTree,
    ) -> tuple[list[Array], list[Any]]:
        """The arrays of every particle's carry before the first step, and their structure.

        What else is in a carry belongs to this trace, and must not go into the state.
        """
        structure = []

        def begin(direction: PyTree) -> list[Array]:
            moved = perturbed(theta, self.sigma, direction)
            x = start_at(x0, moved)
            carry = solver.start(problem.inner, x, moved, inner_state)
            leaves, treedef = jtu.tree_flatten(strong(carry))
            structure.append(treedef)
            return leaves

        return over_particles(begin, directions, self.batch_size), structure


class _Episode(eqx.Module):
    """Where the particles of `PersistentES` stand."""

    # every estimate
    carries: list[Array]  # of the inner solver; particle 0 is not perturbed
    sums: PyTree[Array]  # xi of each pair, in units of sigma
    window: Int[Array, ""]  # within the episode
    num_estimates: Int[Array, ""]  # for the key
    # never
    x0: PyTree[Array] | None  # None if the start is a function of theta


def _check_same_particles(carries: list[Array], fresh: list[Array]) -> None:
    if [a.shape for a in carries] != [a.shape for a in fresh]:
        raise ValueError(
            "`state` does not fit: it comes from PersistentES with another number of pairs, or "
            "with another inner solver. Give the state that the same call returned, or state=None."
        )


def _start_of_episodes(episode: _Episode, x0: PyTree) -> PyTree:
    """Where an episode begins: not at `state.x`, which a warm start gives as `x0`."""
    is_function = episode.x0 is None
    if is_function and not is_start_function(x0):
        raise ValueError(
            "`PersistentES` begins every episode at x0(theta), a function of theta, which this "
            'warm start has replaced by the last x. Use bx.solve, with start=None or start="cold".'
        )
    return x0 if is_function else episode.x0
