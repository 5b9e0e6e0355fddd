"""
A support vector machine with a cost per class
==============================================

One class is rare: a machine that treats all errors alike gives it away. The cost of an error is a
strength like any other; here there is one for each class, learned from the balanced error on
validation data. The inner problem is the dual, a quadratic program in a box `0 <= a <= C` whose
upper bounds are what is learned: the multipliers that are at their bound move with it.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevax as bx

jax.config.update("jax_enable_x64", True)


def draw(seed, num_common, num_rare):
    random = np.random.default_rng(seed)
    common = random.normal(size=(num_common, 2)) @ np.array([[1.3, 0.4], [0.0, 0.9]])
    rare = random.normal(size=(num_rare, 2)) * 0.7 + np.array([1.4, 1.2])
    labels = np.r_[-np.ones(num_common), np.ones(num_rare)]
    return np.r_[common, rare], labels


train, validation, test = draw(0, 120, 12), draw(1, 400, 40), draw(2, 4000, 400)


def kernel(a, b):
    """A Gaussian kernel plus one, which takes the part of the bias."""
    square = jnp.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=-1)
    return jnp.exp(-0.5 * square) + 1.0


# %%
# `theta` holds the logarithms of the two costs. The dual is a smooth function and a box.

points, labels = train
gram = kernel(points, points) * labels[:, None] * labels[None, :] + 1e-3 * jnp.eye(len(labels))
costs = bx.prox.Box(0.0, lambda theta: jnp.where(labels > 0, jnp.exp(theta[1]), jnp.exp(theta[0])))
dual = bx.ProximalMinimum(lambda a, theta: 0.5 * a @ gram @ a - jnp.sum(a), costs)


def score(a, at):
    return kernel(at, points) @ (a * labels)


def balanced_loss(a, theta, data):
    """A logistic loss, in which both classes weigh the same."""
    at, signs = data
    losses = jnp.logaddexp(0.0, -2 * signs * score(a, at))
    rare = signs > 0
    return 0.5 * (
        jnp.sum(jnp.where(rare, losses, 0)) / jnp.sum(rare)
        + jnp.sum(jnp.where(rare, 0, losses)) / jnp.sum(~rare)
    )


problem = bx.Bilevel(dual, balanced_loss, outer_data=validation)
start = jnp.log(jnp.array([1.0, 1.0]))
method = bx.DoubleLoop(optimizer=bx.OuterLBFGS())
solution = bx.solve(problem, jnp.zeros(len(labels)), start, method, num_steps=20)
print(solution)

# %%
first = bx.argmin(dual)(jnp.zeros(len(labels)), start)
for name, a in (("one cost", first), ("learned costs", solution.x)):
    right = np.sign(score(a, test[0])) == test[1]
    rates = right[test[1] > 0].mean(), right[test[1] < 0].mean()
    print(f"{name}: right of the rare class {rates[0]:.0%}, of the common class {rates[1]:.0%}")
costs_found = np.exp(np.asarray(solution.theta))
print(
    f"cost of an error: {costs_found[0]:.2f} of the common class, {costs_found[1]:.2f} of the rare"
)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
grid = np.stack(np.meshgrid(np.linspace(-4.5, 4, 80), np.linspace(-3, 4, 80)), axis=-1)
panels = ((axes[0], "one cost for all", first), (axes[1], "a cost per class", solution.x))
for ax, name, a in panels:
    values = np.asarray(score(a, grid.reshape(-1, 2))).reshape(80, 80)
    ax.contourf(grid[..., 0], grid[..., 1], np.sign(values), levels=[-2, 0, 2], alpha=0.2)
    ax.contour(grid[..., 0], grid[..., 1], values, levels=[0], colors="k")
    for sign, color in ((-1, "tab:blue"), (1, "tab:red")):
        ax.plot(*points[labels == sign].T, "o", color=color, ms=4)
    ax.set_title(name)
axes[0].plot([], [], "o", color="tab:red", label="the rare class")
axes[0].legend(loc="lower left")
plt.show()
