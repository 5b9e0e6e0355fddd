"""
Inside a larger JAX program
===========================

No outer loop of ours here: `bx.argmin` makes the solution of an optimization problem a function
that `jax.grad`, `vmap`, `jit` and `hessian` pass through, to be used like any other layer.

The program: a small network looks at a noisy signal and says how smooth it is at each place; a
smoothing problem with these strengths is then solved; the whole is trained on clean signals, with
Optax.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import optimistix as optx

import bilevax as bx

num_points = 64
x_axis = jnp.arange(num_points)


def draw(key):
    """A smooth signal with two jumps, and the same with noise."""
    keys = jax.random.split(key, 4)
    wave = jnp.sin(0.1 * x_axis + 6 * jax.random.uniform(keys[0]))
    jumps = jax.random.uniform(keys[1], (2,), minval=8, maxval=56)
    heights = jax.random.uniform(keys[2], (2,), minval=1, maxval=3)
    clean = wave + jnp.sum(heights[:, None] * (x_axis > jumps[:, None]), axis=0)
    return clean, clean + 0.2 * jax.random.normal(keys[3], (num_points,))


clean, noisy = jax.vmap(draw)(jax.random.split(jax.random.key(0), 32))
test_clean, test_noisy = jax.vmap(draw)(jax.random.split(jax.random.key(1), 32))

# %%
# The optimization layer: a pseudo-Huber penalty on the differences, with a strength at each
# place.


def energy(x, theta):
    signal, log_strength = theta
    differences = jnp.diff(x)
    penalty = jnp.exp(log_strength) * (jnp.sqrt(1 + (differences / 0.1) ** 2) - 1)
    return 0.5 * jnp.sum((x - signal) ** 2) + jnp.sum(penalty)


smooth = bx.argmin(energy)  # Newton's method, implicit differentiation

# %%
# The network before it: two convolutions.


def network(weights, signal):
    differences = jnp.diff(signal)
    hidden = jnp.stack([differences, jnp.abs(differences)])[None]
    for kernel, bias in weights:
        hidden = jax.lax.conv(hidden, kernel, (1,), "SAME") + bias[:, None]
        hidden = hidden if kernel.shape[0] == 1 else jax.nn.gelu(hidden)
    return hidden[0, 0] - 2.0


def restore(weights, signal):
    return smooth(signal, (signal, network(weights, signal)))


@jax.jit
def loss(weights, clean, noisy):
    restored = jax.vmap(restore, (None, 0))(weights, noisy)
    return jnp.mean((restored - clean) ** 2)


keys = jax.random.split(jax.random.key(2), 2)
weights = [
    (0.3 * jax.random.normal(keys[0], (8, 2, 5)), jnp.zeros(8)),
    (0.1 * jax.random.normal(keys[1], (1, 8, 5)), jnp.zeros(1)),
]
optimizer = optax.adam(0.03)


@jax.jit
def step(weights, state):
    grad = jax.grad(loss)(weights, clean, noisy)
    updates, state = optimizer.update(grad, state)
    return optax.apply_updates(weights, updates), state


def constant(strength):
    """The same layer with one strength everywhere."""
    everywhere = jnp.full(num_points - 1, strength)
    return jax.vmap(lambda signal: smooth(signal, (signal, everywhere)))(test_noisy)


state = optimizer.init(weights)
for _ in range(150):
    weights, state = step(weights, state)

best = min(
    (constant(s) for s in jnp.linspace(-5, 1, 7)), key=lambda x: jnp.mean((x - test_clean) ** 2)
)
print("mean squared error on new signals")
print(f"    as measured              {jnp.mean((test_noisy - test_clean) ** 2):.4f}")
print(f"    best constant strength   {jnp.mean((best - test_clean) ** 2):.4f}")
print(f"    strengths by the network {loss(weights, test_clean, test_noisy):.4f}")

# %%
# The same rule as an adjoint of Optimistix: for programs that call its solvers already.

signal, log_strength = noisy[0], jnp.full(num_points - 1, -2.0)


def by_optimistix(log_strength):
    found = optx.minimise(
        energy,
        optx.BFGS(rtol=1e-5, atol=1e-5),
        signal,
        args=(signal, log_strength),
        adjoint=bx.Implicit(),
        max_steps=1000,
    )
    return jnp.sum((found.value - clean[0]) ** 2)


def by_argmin(log_strength):
    return jnp.sum((smooth(signal, (signal, log_strength)) - clean[0]) ** 2)


first, second = jax.grad(by_optimistix)(log_strength), jax.grad(by_argmin)(log_strength)
print(f"\ntwo ways to one gradient, difference: {jnp.linalg.norm(first - second):.1e}")
print(f"                              norm: {jnp.linalg.norm(second):.1e}")

# %%
# Where the network sees a jump it lets go.

figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
axes[0].plot(test_noisy[0], ".", color="0.6", label="measured")
axes[0].plot(test_clean[0], "k", label="clean")
axes[0].plot(best[0], "C0--", label="best constant strength")
axes[0].plot(restore(weights, test_noisy[0]), "C1", label="strengths by the network")
axes[0].legend()
axes[1].plot(network(weights, test_noisy[0]), "C1")
axes[1].set(xlabel="place", title="log strength, given by the network")
plt.show()
