"""
A layer that is a fixed point
=============================

A deep equilibrium model has one layer, applied until nothing changes any more: its output for the
input `u` is the `z` with `z = tanh(W z + V u + b)`. Training it is a bilevel problem whose inner
level is no minimum but a fixed point. Backpropagation through the iterations would keep all of
them; implicit differentiation solves one linear system, whose matrix is not symmetric, by GMRES.

Reference: Bai, Kolter, Koltun, "Deep equilibrium models", 2019.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_moons

import bilevax as bx

num_hidden = 12
inputs, labels = make_moons(200, noise=0.15, random_state=0)
inputs, labels = jnp.asarray(inputs, jnp.float32), jnp.asarray(2.0 * labels - 1, jnp.float32)


def layer(z, theta, inputs):
    # The norm below one makes it a contraction: there is one fixed point, and iterating finds it.
    matrix = 0.9 * theta["W"] / jnp.maximum(jnp.linalg.norm(theta["W"]), 0.9)
    return jnp.tanh(z @ matrix.T + inputs @ theta["V"].T + theta["b"])


def outer(z, theta, labels):
    scores = z @ theta["readout"]
    weights = jax.tree.leaves(theta)
    return jnp.mean(jax.nn.softplus(-labels * scores)) + 1e-4 * sum(jnp.sum(w**2) for w in weights)


# %%
# `x` holds the fixed points of all samples at once. Each outer step starts at those of the last.

problem = bx.Bilevel(bx.FixedPoint(layer), outer, inner_data=inputs, outer_data=labels)
keys = jax.random.split(jax.random.key(0), 4)
theta0 = {
    "W": 0.5 * jax.random.normal(keys[0], (num_hidden, num_hidden)),
    "V": jax.random.normal(keys[1], (num_hidden, 2)),
    "b": 0.1 * jax.random.normal(keys[2], (num_hidden,)),
    "readout": 0.1 * jax.random.normal(keys[3], (num_hidden,)),
}
method = bx.DoubleLoop(optimizer=optax.adam(0.05))
solution = bx.solve(problem, jnp.zeros((200, num_hidden)), theta0, method, num_steps=150)
print(solution)

accuracy = jnp.mean(jnp.sign(solution.x @ solution.theta["readout"]) == labels)
print(f"training accuracy {accuracy:.1%}")

# %%
# For new inputs the layer is a function like any other: `bx.argmin` finds the fixed point, and
# could be differentiated again.

side = 60
grid = np.stack(np.meshgrid(np.linspace(-1.7, 2.7, side), np.linspace(-1.2, 1.7, side)), axis=-1)
grid = jnp.asarray(grid.reshape(-1, 2), jnp.float32)
equilibrium = bx.argmin(bx.FixedPoint(layer, grid))
scores = equilibrium(jnp.zeros((len(grid), num_hidden)), solution.theta) @ solution.theta["readout"]

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
plane = [np.asarray(a).reshape(side, side) for a in (grid[:, 0], grid[:, 1], scores)]
axes[0].contourf(*plane, levels=np.linspace(-12, 12, 25), cmap="RdBu", alpha=0.7, extend="both")
axes[0].contour(*plane, levels=[0], colors="k")
for label, color in ((-1, "darkred"), (1, "darkblue")):
    axes[0].scatter(*inputs[labels == label].T, c=color, edgecolors="white", s=25)
axes[0].set(title="scores of the equilibrium layer")
axes[1].semilogy(solution.history.value, label="outer objective")
axes[1].plot(solution.history.num_inner_steps, ".", label="fixed-point iterations")
axes[1].plot(solution.history.num_adjoint_steps, ".", label="GMRES steps")
axes[1].set(xlabel="outer step")
axes[1].legend()
plt.show()
