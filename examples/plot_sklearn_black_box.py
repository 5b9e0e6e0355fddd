"""
Scikit-learn as the inner solver
================================

The strength `C` of a `LogisticRegression` is usually searched on a grid: one number, because a
grid of several is out of reach. With a hypergradient several cost no more than one.

Scikit-learn's breast cancer data has 30 features in three groups: mean, standard error and worst
value of ten measurements. We learn one strength per group. Scikit-learn does the fitting.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import bilevax as bx

jax.config.update("jax_enable_x64", True)

features, labels = load_breast_cancer(return_X_y=True)
features = StandardScaler().fit_transform(features)
order = np.random.default_rng(0).permutation(len(labels))
train, validation, test = ((features[p], 2.0 * labels[p] - 1) for p in np.split(order, (190, 380)))
group = np.repeat(np.arange(3), 10)  # mean, standard error, worst

# %%
# What scikit-learn minimises, written in JAX: the condition that its answer must satisfy. The
# intercept is not regularised. `x` is a dict, as it might be any pytree.


def loss(x, data):
    features, labels = data
    margins = labels * (features @ x["weights"] + x["intercept"])
    return jnp.mean(jax.nn.softplus(-margins))


def inner(x, theta, data):
    strength = jnp.exp(theta)[group]
    return loss(x, data) + 0.5 * jnp.sum(strength * x["weights"] ** 2)


def outer(x, theta, data):
    return loss(x, data)


# %%
# Scikit-learn knows one strength only, but a feature that is divided by the root of its strength
# has its own. `C` multiplies the sum of the losses where we have the mean. Its default solver
# stops where the loss no longer falls, and leaves a gradient that is too large for a
# hypergradient of six digits; Newton's method does not.


def sklearn_fit(x0, theta, data):
    features, labels = data
    scale = np.exp(-0.5 * theta)[group]
    model = LogisticRegression(C=1 / len(labels), tol=1e-8, solver="newton-cholesky")
    model.fit(features * scale, labels)
    return {"weights": scale * model.coef_[0], "intercept": model.intercept_[0]}


x0 = {"weights": jnp.zeros(30), "intercept": jnp.array(0.0)}
problem = bx.Bilevel(inner, outer, inner_data=train, outer_data=validation)
estimate, _ = bx.hypergradient(
    problem, x0, jnp.full(3, -4.0), inner_solver=bx.External(sklearn_fit)
)
print("hypergradient in the three log strengths:", estimate.grad.round(5))
print(f"inner residual {estimate.inner_residual:.1e}, adjoint {estimate.adjoint_residual:.1e}\n")

# %%
# Forty steps of Adam from the best single strength of a grid.

grid = np.linspace(-10, 0, 21)
losses = [loss(sklearn_fit(x0, np.full(3, s), train), validation) for s in grid]
best = grid[np.argmin(losses)]
method = bx.DoubleLoop(inner_solver=bx.External(sklearn_fit), optimizer=optax.adam(0.2))
solution = bx.solve(problem, x0, jnp.full(3, best), method, num_steps=40)
print(solution)

single = sklearn_fit(x0, np.full(3, best), train)
print("\nmean log loss         validation    test")
for name, x in (("best single strength", single), ("one per group", solution.x)):
    print(f"{name:22}{loss(x, validation):10.4f}{loss(x, test):8.4f}")

# %%
# The validation loss is always better with three strengths than with one: it is what was
# minimised. The test loss says whether it was worth it.

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
axes[0].plot(grid, losses, "o-", label="one strength, on a grid")
axes[0].axhline(solution.value, color="C1", label="one per group, learned")
axes[0].set(xlabel="log strength", ylabel="validation loss")
axes[0].legend()
axes[1].bar(["mean", "standard error", "worst"], solution.theta - best, color="C1")
axes[1].axhline(0, color="k", linewidth=0.8)
axes[1].set(ylabel="log strength, less the best single one", title="learned strengths")
plt.show()
