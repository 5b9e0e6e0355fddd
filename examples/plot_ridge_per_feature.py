"""
One regularisation strength per feature
=======================================

Scikit-learn's diabetes data: ten measurements of 442 patients, and how the disease went on. We
add thirty columns of pure noise, as a stand-in for the measurements that nobody needed, and learn
one l2 strength per column: the inner problem fits the training set, the outer one asks how the
fit does on a validation set. A test set that neither has seen judges.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes

import bilevax as bx

random = np.random.default_rng(0)
features, targets = load_diabetes(return_X_y=True)
features = np.hstack([features / features.std(axis=0), random.normal(size=(len(targets), 30))])
targets = (targets - targets.mean()) / targets.std()
order = random.permutation(len(targets))
train, validation, test = ((features[part], targets[part]) for part in np.split(order, (150, 300)))

# %%
# The two objectives take `(x, theta, data)`. The strengths are positive, so theta holds their
# logarithms.


def outer(x, theta, data):
    features, targets = data
    return 0.5 * jnp.mean((features @ x - targets) ** 2)


def inner(x, theta, data):
    return outer(x, theta, data) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


problem = bx.Bilevel(inner, outer, inner_data=train, outer_data=validation)
x0, theta0 = jnp.zeros(40), jnp.full(40, -3.0)

# %%
# First the classic: one strength for all columns, the best of a grid. `bx.argmin` is the fit.

fit = bx.argmin(bx.Minimum(inner, problem.inner_data))
grid = [fit(x0, jnp.full(40, strength)) for strength in np.linspace(-6, 3, 19)]
single = min(grid, key=lambda x: outer(x, None, validation))

# %%
# Then one strength each. `method=` would take another inner solver, rule or optimiser. With forty
# strengths and 150 patients the validation set can be overfitted too, so a few steps are enough.

solution = bx.solve(problem, x0, theta0, num_steps=40)
print(solution)

print("\nmean squared error on the test set (1 is the error of the mean)")
for name, x in (
    ("almost no regulariser", grid[0]),
    ("one strength", single),
    ("forty", solution.x),
):
    print(f"    {name:24}{2 * outer(x, None, test):.3f}")

# %%
# Most columns of noise are shut out, and so are the measurements that say little beside the
# others. A few columns of noise are let in: by chance they help on these 150 patients.

figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
change = solution.theta - theta0
axes[0].bar(np.arange(10), change[:10], label="measurements")
axes[0].bar(np.arange(10, 40), change[10:], color="0.6", label="noise")
axes[0].set(xlabel="column", ylabel="change of log strength")
axes[0].legend(loc="lower right")
axes[1].plot(solution.history.value)
axes[1].set(xlabel="outer step", ylabel="validation loss")
plt.show()
