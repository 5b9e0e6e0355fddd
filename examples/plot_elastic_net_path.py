"""
An elastic net that finds its two strengths
===========================================

Scikit-learn's diabetes data with thirty columns of pure noise. An elastic net has two strengths,
`l1`, which switches columns off, and `l2`, which shrinks the rest; a grid of both is a product.
Here the validation loss is a function of both with a derivative: on each piece of the path, where
no column enters or leaves, it is smooth, and at the kinks between two pieces the hypergradient says
so instead of returning a number.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes

import bilevax as bx

jax.config.update("jax_enable_x64", True)

random = np.random.default_rng(0)
features, targets = load_diabetes(return_X_y=True)
features = np.hstack([features / features.std(axis=0), random.normal(size=(len(targets), 30))])
targets = (targets - targets.mean()) / targets.std()
order = random.permutation(len(targets))
train, validation, test = ((features[part], targets[part]) for part in np.split(order, (150, 300)))


def loss(x, theta, data):
    features, targets = data
    return 0.5 * jnp.mean((features @ x - targets) ** 2)


# %%
# The smooth part and the penalty are given apart. Strengths are positive, so theta holds their
# logarithms.

elastic_net = bx.ProximalMinimum(
    loss, bx.prox.ElasticNet(lambda t: jnp.exp(t["l1"]), lambda t: jnp.exp(t["l2"])), train
)
problem = bx.Bilevel(elastic_net, loss, outer_data=validation)
x0 = jnp.zeros(40)

# %%
# A group lasso keeps or drops columns five at a time: two groups of data, six of noise.

groups = np.repeat(np.arange(8), 5)
group_lasso = bx.ProximalMinimum(loss, bx.prox.GroupL2(lambda t: jnp.exp(t["l1"]), groups), train)
grouped = bx.Bilevel(group_lasso, loss, outer_data=validation)

# %%
# The paths in `l1`: loss, hypergradient, and differences of the loss between the points.

path = np.linspace(-7, -0.5, 200)


def along(problem, **others):
    """What is found along the path, the slopes of the loss, and where nothing is flagged."""
    found = jax.vmap(
        lambda l1: bx.hypergradient(problem, x0, {"l1": l1, **others}, throw=False)[0]
    )(jnp.asarray(path))
    slopes = np.gradient(np.asarray(found.value), path)
    return found, slopes, np.asarray(found.result == bx.RESULTS.successful)


print("points of a path:", len(path))
paths = {"elastic net": along(problem, l2=jnp.array(-4.0)), "group lasso": along(grouped)}
for name, (found, slopes, is_right) in paths.items():
    error = np.abs(slopes - np.asarray(found.grad["l1"]))[is_right]
    print(f"{name}: {np.sum(~is_right)} flagged (no column is left, or at a kink); median ", end="")
    print(f"difference of the others from the slope of the loss: {np.median(error):.1e}")

# %%
# Both strengths at once, from far too strong a penalty, by L-BFGS.

start = {"l1": jnp.array(-1.5), "l2": jnp.array(0.0)}
method = bx.DoubleLoop(optimizer=bx.OuterLBFGS())
solution = bx.solve(problem, x0, start, method, num_steps=40)
print(solution)
first = bx.argmin(elastic_net)(x0, start)
for name, x in (("at the start", first), ("learned", solution.x)):
    print(f"{name}: test error {2 * loss(x, None, test):.3f}, columns kept {np.sum(x != 0)} of 40")

# %%
fig, rows = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
for (name, (found, slopes, is_right)), (left, right) in zip(paths.items(), rows, strict=True):
    left.plot(path, found.value)
    left.set_ylabel("validation loss")
    left.set_title(name)
    twin = left.twinx()
    num_columns = np.sum(np.asarray(found.x) != 0, axis=1)
    twin.step(path, num_columns, color="tab:gray", alpha=0.6, where="mid")
    twin.set_ylabel("columns kept", color="tab:gray")
    right.plot(path, slopes, color="tab:orange", lw=3, alpha=0.5, label="slope of the loss")
    grad = np.asarray(found.grad["l1"])
    right.plot(path[is_right], grad[is_right], "k", lw=1, label="hypergradient")
    right.plot(path[~is_right], slopes[~is_right], "rx", ms=4, label="flagged")
    right.legend(fontsize=8)
for axis in rows[-1]:
    axis.set_xlabel("logarithm of the l1 strength")
fig.suptitle("The paths of an elastic net and of a group lasso, and their derivatives")
plt.show()
