"""
A chaotic inner loop
====================

Some inner loops have no use for their own derivative. Here the inner problem is a population model,
100 generations of the logistic map, and the outer objective asks for a growth rate at which 200
populations end with a variance of 1/16. The map is chaotic: the derivative of 100 steps is exact,
and of size 1e16 or so. It says how the objective changes over a distance of 1e-17, and nothing
about the direction in which to move. ``bx.Unrolled`` flags it; evolution strategies look at
the objective at pairs of perturbed growth rates, and give the gradient of its *smoothing*.

References: Metz, Freeman, Schoenholz, Kachman, "Gradients are not all you need", 2021; Vicol, Metz,
Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent
evolution strategies", 2021.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import optimistix as optx

import bilevax as bx

num_generations, target = 100, 1 / 16
populations = jnp.linspace(0.1, 0.9, 200)


def grow(x, rate):
    return rate * x * (1 - x)


def outer(x, rate):
    return (jnp.var(x) / target - 1) ** 2


problem = bx.Bilevel(bx.FixedPoint(grow), outer)
# The iteration, as many steps as there are generations: it never meets these tolerances.
generations = bx.Optimistix(optx.FixedPointIteration(rtol=1e-30, atol=1e-30), num_generations)

# %%
# At one growth rate, the exact derivative of the steps, and the gradient of the smoothed objective
# with its standard error.

rate = jnp.asarray(3.82)
sigma = 0.03
arguments = {"inner_solver": generations, "throw": False}
exact, _ = bx.hypergradient(problem, populations, rate, rule=bx.Unrolled(), **arguments)
print(f"exact derivative of {num_generations} steps   {exact.grad:.2e}")
strategies = bx.EvolutionStrategies(jax.random.key(0), num_pairs=200, sigma=sigma)
smoothed, _ = bx.hypergradient(problem, populations, rate, rule=strategies, **arguments)
print(f"evolution strategies   {smoothed.grad:.4f} +- {smoothed.error_estimate:.4f}")
print(f"the outcome of unrolling: {bx.RESULTS[exact.result]}")

# %%
# The objective over the growth rate: a rugged curve around a smooth one.


@jax.vmap
def objective(rate):
    x, _ = jax.lax.scan(lambda x, _: (grow(x, rate), None), populations, length=num_generations)
    return outer(x, rate)


rates = jnp.linspace(3.45, 3.98, 6_001)
values = objective(rates)
coarse = rates[1_500:-1_200:40]
distances = rates[:, None] - coarse
weights = jnp.exp(-0.5 * (distances / sigma) ** 2)
smooth = jnp.sum(weights * values[:, None], axis=0) / jnp.sum(weights, axis=0)


# %%
# And both gradients over the growth rate. One call for all rates, by ``jax.vmap``.


@jax.vmap
def gradients(rate, key):
    unrolled, _ = bx.hypergradient(problem, populations, rate, rule=bx.Unrolled(), **arguments)
    rule = bx.EvolutionStrategies(key, num_pairs=100, sigma=sigma)
    estimate, _ = bx.hypergradient(problem, populations, rate, rule=rule, **arguments)
    return unrolled.grad, estimate.grad, estimate.error_estimate


some_rates = rates[1_700:-1_500:100]
unrolled, estimated, error = gradients(
    some_rates, jax.random.split(jax.random.key(1), len(some_rates))
)

# %%
# The outer problem, by persistent evolution strategies: 20 generations for each outer step, so that
# theta moves five times in every episode of 100 generations. (The two values of the objective that
# are printed are single points of the rugged curve, and prove nothing.)

method = bx.DoubleLoop(
    inner_solver=generations,
    hypergradient=bx.PersistentES(jax.random.key(2), num_steps=20, num_pairs=50, sigma=sigma),
    optimizer=optax.adam(5e-3),
)
solution = bx.solve(problem, populations, rate, method, num_steps=150)
print(solution)
print(f"growth rate {solution.theta:.3f}")
print(f"the smoothed objective is smallest at {coarse[jnp.argmin(smooth)]:.3f}")

# %%
# The derivative of the steps is drawn on a scale of powers of ten, on both sides of zero.

figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
axes[0].plot(rates, values, "C7", linewidth=0.5, label="objective")
axes[0].plot(coarse, smooth, "C1", label="smoothed")
axes[0].axvline(solution.theta, color="C2", linestyle=":", label="found")
axes[0].set(xlabel="growth rate", title="the outer objective", xlim=(coarse[0], coarse[-1]))
axes[0].legend()
axes[1].plot(some_rates, unrolled, "C3.")
axes[1].set_yscale("symlog", linthresh=1.0)
axes[1].set(xlabel="growth rate", title="exact derivative of the steps", xlim=axes[0].get_xlim())
axes[2].errorbar(some_rates, estimated, error, fmt="C0.", label="evolution strategies")
axes[2].plot(coarse, jnp.gradient(smooth, coarse), "C1", label="of the smoothed")
axes[2].axhline(0, color="black", linewidth=0.5)
axes[2].set(xlabel="growth rate", title="gradient from values", xlim=axes[0].get_xlim())
axes[2].legend()
plt.show()
