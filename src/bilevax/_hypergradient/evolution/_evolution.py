"""Evolution strategies: the gradient of a smoothed objective, from its values alone."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from ..._problem import start_at
from .._base import Estimate, HypergradientState, Query
from ._perturb import (
    AbstractEvolution,
    as_sigma,
    check_inner_solver,
    check_rule_state,
    check_settings,
    draw,
    evolution_estimate,
    gradient_and_error,
    over_particles,
    perturbed,
)


class EvolutionStrategies(AbstractEvolution):
    """The gradient of the smoothed objective, from pairs of perturbed inner solves.

        grad = mean over pairs of  z (L_K(theta + sigma z) - L_K(theta - sigma z)) / (2 sigma)

    with `z` standard normal and `L_K(theta) = L(x_K(theta), theta)` the problem truncated
    after the inner solver's steps. Nothing is differentiated: for inner solves that are
    chaotic, noisy or piecewise constant in theta, where the exact derivative explodes or
    is zero.

    **Arguments:**

    - `key`: a random key, `jax.random.key(0)` say. There is no default. The perturbations
        of an estimate are a function of the key and of the number of estimates in the
        state: without `state` the same call gives the same answer.
    - `num_pairs`: the number of antithetic pairs `theta +- sigma z`. The standard error
        falls with its square root.
    - `sigma`: the standard deviation of the perturbations: one number, or a pytree like
        theta (`None` where theta has no array) of numbers or arrays. The smoothing makes a
        bias of order `sigma^2` where the objective is smooth, and is the purpose where not.
    - `batch_size`: how many pairs run side by side; by default all.

    `estimate.x` and `estimate.value` belong to the solve at theta itself. Of the evidence,
    `error_estimate` is the standard error of the gradient, measured over the pairs (`None`
    for one pair): the distance to the gradient of the *smoothed* objective.

    What is differentiated: theta, also where the optimiser's own parameters or `x0` are
    functions of it. With a warm start (`state=` or `DoubleLoop(start="warm")`, its default)
    this is *truncated* evolution strategies: the influence of theta on the `x` it starts
    from is ignored, which biases a gradient over long horizons. Then use `PersistentES`.

    **Cost:** `2 num_pairs + 1` inner solves; memory of as many `x`. The variance grows
    with the number of entries of theta: for few outer variables.

    **Exact when** never; unbiased for the gradient of `E L_K(theta + sigma z)`.

    !!! example

        ```python
        import bilevax as bx, jax

        rule = bx.EvolutionStrategies(jax.random.key(0), num_pairs=64, sigma=0.05)
        ```

    Reference: Salimans et al., "Evolution strategies as a scalable alternative to
    reinforcement learning", 2017, section 2; Vicol, Metz, Sohl-Dickstein, "Unbiased
    gradient estimation in unrolled computation graphs with persistent evolution
    strategies", 2021, eq. (3), for the antithetic form.
    """

    key: Array
    num_pairs: int
    sigma: PyTree
    batch_size: int | None

    def __init__(
        self,
        key: Array,
        *,
        num_pairs: int = 32,
        sigma: PyTree = 0.1,
        batch_size: int | None = None,
    ) -> None:
        check_settings(key, num_pairs, batch_size)
        self.key = key
        self.num_pairs = num_pairs
        self.sigma = as_sigma(sigma)
        self.batch_size = batch_size

    def init(self, query: Query) -> HypergradientState:
        check_inner_solver(self, query.inner_solver)
        count = jnp.asarray(0, jnp.int32)
        return HypergradientState(x=query.start, v=None, inner=query.inner_state, rule=count)

    def estimate(
        self, query: Query, state: HypergradientState
    ) -> tuple[Estimate, HypergradientState]:
        problem, inner_solver, x0, theta = query
        check_inner_solver(self, inner_solver)
        check_rule_state(self, state, jax.Array)

        def solve(theta: PyTree) -> tuple:
            start = start_at(x0, theta)
            return inner_solver.solve(problem.inner, start, theta, state.inner)

        def difference(direction: PyTree) -> Scalar:
            """`L(theta + sigma z) - L(theta - sigma z)`, both from one trace of the solve."""
            both = jtu.tree_map(lambda z: jnp.stack([z, -z]), direction)
            values = jax.vmap(value)(both)
            return values[0] - values[1]

        def value(direction: PyTree) -> Scalar:
            moved = perturbed(theta, self.sigma, direction)
            return problem.outer_value(solve(moved)[0].x, moved)[0]

        # 1. the pairs
        directions = draw(jax.random.fold_in(self.key, state.rule), self.num_pairs, theta)
        differences = over_particles(difference, directions, self.batch_size)
        grad, error = gradient_and_error(directions, differences, self.sigma)
        # 2. theta itself
        solution, inner_state = solve(theta)
        num_solves = 2 * self.num_pairs + 1
        counts = jtu.tree_map(lambda c: num_solves * c, solution.counts)
        estimate = evolution_estimate(
            problem, solution.x, theta, grad, error, counts, solution.num_steps
        )
        new_state = HypergradientState(x=solution.x, v=None, inner=inner_state, rule=state.rule + 1)
        return estimate, new_state
