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
# Then one strength each. `method=` would take another inner solver, rule or optimiser. A callback
# sees every step: here it notes the loss on the test set, which nothing learns from.

test_losses = []
solution = bx.solve(
    problem,
    x0,
    theta0,
    num_steps=200,
    callback=lambda seen: test_losses.append(2 * outer(seen.x, None, test)),
)
print(solution)

print("\nmean squared error (1 is the error of the mean)   validation    test")
for name, x in (
    ("almost no regulariser", grid[0]),
    ("one strength", single),
    ("forty", solution.x),
):
    print(f"    {name:44}{2 * outer(x, None, validation):12.3f}{2 * outer(x, None, test):8.3f}")

# %%
# Forty strengths pay here, since thirty columns ought to be shut out. But the validation loss,
# which they were fitted to, says nothing about that: it promises far more than the test set
# keeps. Where there is less to gain, and less data, they do not always pay. The ten measurements
# alone, 40 patients to fit, 40 to validate, six times at random:


def compare(seed, num=40):
    """Validation and test loss: of one strength, of ten, and of ten in every step."""
    order = np.random.default_rng(seed).permutation(len(targets))
    parts = np.split(order, (num, 2 * num))
    train, validation, test = ((features[part, :10], targets[part]) for part in parts)
    problem = bx.Bilevel(inner, outer, inner_data=train, outer_data=validation)
    fit = bx.argmin(bx.Minimum(inner, problem.inner_data))
    grid = [fit(jnp.zeros(10), jnp.full(10, strength)) for strength in np.linspace(-6, 3, 19)]
    single = min(grid, key=lambda x: outer(x, None, validation))
    path = []
    solution = bx.solve(
        problem,
        jnp.zeros(10),
        jnp.full(10, -3.0),
        num_steps=200,
        callback=lambda seen: path.append((2 * seen.value, 2 * outer(seen.x, None, test))),
    )
    ends = [2 * outer(x, None, data) for x in (single, solution.x) for data in (validation, test)]
    return [float(loss) for loss in ends], np.array(path, dtype=float)


runs = [compare(seed) for seed in range(6)]
print("\nten measurements   one strength          ten strengths")
print("split              validation    test    validation    test")
for seed, ((val_one, test_one, val_ten, test_ten), _) in enumerate(runs):
    verdict = "better" if test_ten < test_one else "worse"
    print(f"{seed:5}{val_one:23.3f}{test_one:8.3f}{val_ten:14.3f}{test_ten:8.3f}  {verdict}")

# %%
# The validation loss of ten strengths is always lower. The test loss is lower in three of six
# splits and higher in the other three: on the right, one where it rises while the other falls.
# So hold data back that neither level sees; compare with one strength there; and if you stop
# early by a held-back loss, judge by yet other data.

figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
change = solution.theta - theta0
axes[0].bar(np.arange(10), change[:10], label="measurements")
axes[0].bar(np.arange(10, 40), change[10:], color="0.6", label="noise")
axes[0].set(xlabel="column", ylabel="change of log strength")
axes[0].legend(loc="lower right")
axes[1].plot(2 * solution.history.value, label="validation")
axes[1].plot(np.arange(1, len(test_losses) + 1), test_losses, label="test")
axes[1].axhline(2 * outer(single, None, test), color="C1", ls="--", label="test, one strength")
axes[1].set(xlabel="outer step", ylabel="mean squared error", title="forty columns: it pays")
axes[1].legend()
(_, test_one, _, _), path = runs[0]
axes[2].plot(path[:, 0], label="validation")
axes[2].plot(path[:, 1], label="test")
axes[2].axhline(test_one, color="C1", ls="--", label="test, one strength")
axes[2].set(xlabel="outer step", title="ten measurements, 40 patients: it does not")
axes[2].legend()
plt.show()
