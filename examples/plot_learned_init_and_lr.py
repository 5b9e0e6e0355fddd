"""
A learned start and a learned step size
=======================================

Few-shot learning: a new task comes with ten measurements, and five steps of gradient descent must
do. What can be learned from old tasks is where to start and how far to step. Neither changes the
*solution* of a task, so implicit differentiation would return zero; the five steps are the inner
problem, and unrolling differentiates them exactly.

Reference: Finn, Abbeel, Levine, "Model-agnostic meta-learning", 2017; the step size per parameter
as in Li et al., "Meta-SGD", 2017.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevax as bx

num_features, num_tasks, num_measurements = 40, 100, 10


def features(times):
    """Cosines and sines of many frequencies: a rich model, ten measurements cannot fix it."""
    frequencies = jnp.arange(1, num_features // 2 + 1) / 2
    angles = times[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def draw(key):
    """One task: noisy measurements of its own sine, to learn from and to be judged by."""
    keys = jax.random.split(key, 4)
    amplitude = jax.random.uniform(keys[0], minval=0.5, maxval=2.0)
    phase = jax.random.uniform(keys[1], minval=0.0, maxval=1.0)
    times = jax.random.uniform(keys[2], (2, num_measurements), minval=-3.0, maxval=3.0)
    noise = 0.1 * jax.random.normal(keys[3], times.shape)
    values = amplitude * jnp.sin(times + phase) + noise
    return (features(times[0]), values[0]), (features(times[1]), values[1])


train, judge = jax.vmap(draw)(jax.random.split(jax.random.key(0), num_tasks))
new_train, new_judge = jax.vmap(draw)(jax.random.split(jax.random.key(1), num_tasks))

# %%
# `x` holds the weights of all tasks, a row each. The tasks share nothing but theta: the start,
# and one step size per weight, which the optimiser gets as a function of theta.


def inner(x, theta, data):
    features, values = data
    errors = jnp.einsum("tmf,tf->tm", features, x) - values
    return 0.5 * jnp.sum(errors**2) / num_measurements


def outer(x, theta, data):
    return inner(x, theta, data) / num_tasks


def start(theta):
    return jnp.tile(theta["start"], (num_tasks, 1))


five_steps = bx.Descent(lambda theta: optax.sgd(jnp.exp(theta["log_step"])), num_steps=5)
problem = bx.Bilevel(inner, outer, inner_data=train, outer_data=judge)
theta0 = {"start": jnp.zeros(num_features), "log_step": jnp.full(num_features, -3.0)}
method = bx.DoubleLoop(five_steps, bx.Unrolled(), optimizer=optax.adam(0.05))
solution = bx.solve(problem, start, theta0, method, num_steps=150)
print(solution)

# %%
# The judgement: five steps on new tasks. Only what was learned is carried over. For comparison,
# zero start and the best single step size.

new_problem = bx.Minimum(inner, new_train)
adapt = bx.argmin(new_problem, five_steps, bx.Unrolled())


def error(theta):
    return 2 * outer(adapt(start, theta), theta, new_judge)


single = min(
    ({**theta0, "log_step": jnp.full(num_features, a)} for a in (-4.0, -3.0, -2.0, -1.0)),
    key=error,
)
print("\nmean squared error on new tasks after five steps")
print(f"    zero start, best single step size   {error(single):.3f}")
only_start = {**single, "start": solution.theta["start"]}
print(f"    learned start                       {error(only_start):.3f}")
print(f"    learned start and step sizes        {error(solution.theta):.3f}")

# %%
# One new task before and after, and the step sizes: the frequencies that the tasks have in common
# are learned fast, the others hardly at all.

times = jnp.linspace(-3, 3, 200)
curve = features(times)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
measured = jnp.arctan2(new_train[0][0][:, 21], new_train[0][0][:, 1])  # sine and cosine of time
axes[0].plot(measured, new_train[1][0], "ko", label="ten measurements")
axes[0].plot(times, curve @ adapt(start, single)[0], "C7", label="zero start, one step size")
axes[0].plot(times, curve @ solution.theta["start"], "C1:", label="learned start")
axes[0].plot(times, curve @ adapt(start, solution.theta)[0], "C1", label="after five steps")
axes[0].set(xlabel="time", title="a new task")
axes[0].legend()
half = num_features // 2
step_sizes = jnp.exp(solution.theta["log_step"])
axes[1].bar(jnp.arange(1, half + 1) / 2, step_sizes[:half], 0.4, label="cosines")
axes[1].bar(jnp.arange(1, half + 1) / 2, -step_sizes[half:], 0.4, label="sines (downwards)")
axes[1].set(xlabel="frequency", title="learned step sizes")
axes[1].legend()
plt.show()
