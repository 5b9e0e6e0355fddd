"""
SciPy as the inner solver
=========================

Implicit differentiation does not care how `x` was found. Here `scipy.optimize.minimize` finds it,
on the host, with its own arithmetic in float64; bilevax sees only the condition that `x` must
satisfy, checks that it does, and differentiates that.

The problem: fit a polynomial to data with outliers by the pseudo-Huber loss, which is quadratic
below a threshold and linear above it. The threshold and an l2 strength are learned from a few
points that somebody has checked by hand.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize

import bilevax as bx

jax.config.update("jax_enable_x64", True)

random = np.random.default_rng(1)


def measure(num_samples, num_outliers):
    times = np.sort(random.uniform(-1, 1, num_samples))
    values = np.sin(3 * times) + 0.1 * random.normal(size=num_samples)
    values[random.permutation(num_samples)[:num_outliers]] += random.uniform(2, 6, num_outliers)
    return np.vander(times, 8, increasing=True), values


train, checked = measure(80, 25), measure(20, 0)


def huber(error, threshold):
    return threshold**2 * (jnp.sqrt(1 + (error / threshold) ** 2) - 1)


def inner(x, theta, data):
    features, values = data
    loss = jnp.mean(huber(features @ x - values, jnp.exp(theta["log_threshold"])))
    return loss + 0.5 * jnp.exp(theta["log_strength"]) * jnp.sum(x**2)


def outer(x, theta, data):
    features, values = data
    return jnp.mean((features @ x - values) ** 2)


# %%
# The black box: NumPy in, NumPy out. It could as well be a binary that reads a file. Note that it
# is given `x0`, the solution of the previous outer step.


def fit(x0, theta, data):
    features, values = data
    threshold, strength = np.exp(theta["log_threshold"]), np.exp(theta["log_strength"])

    def value_and_gradient(x):
        error = features @ x - values
        root = np.sqrt(1 + (error / threshold) ** 2)
        value = threshold**2 * np.mean(root - 1) + 0.5 * strength * x @ x
        return value, features.T @ (error / root) / len(values) + strength * x

    options = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 2000}
    return scipy.optimize.minimize(
        value_and_gradient, x0, jac=True, method="L-BFGS-B", options=options
    ).x


problem = bx.Bilevel(inner, outer, inner_data=train, outer_data=checked)
theta0 = {"log_threshold": jnp.array(2.0), "log_strength": jnp.array(-4.0)}
method = bx.DoubleLoop(inner_solver=bx.External(fit), optimizer=optax.adam(0.2))
solution = bx.solve(problem, jnp.zeros(8), theta0, method, num_steps=60)
print(solution)
print({name: f"{np.exp(value):.4f}" for name, value in solution.theta.items()})

# %%
# A black box that returns something else than a solution is found out, because the residual is
# measured: here SciPy is stopped after five iterations.


inner_gradient = jax.jit(jax.grad(inner))


def lazy_fit(x0, theta, data):
    return scipy.optimize.minimize(
        lambda x: float(inner(x, theta, data)),
        x0,
        jac=lambda x: np.asarray(inner_gradient(x, theta, data)),
        method="BFGS",
        options={"maxiter": 5},
    ).x


try:
    bx.hypergradient(problem, jnp.zeros(8), theta0, inner_solver=bx.External(lazy_fit))
except bx.SolveError as error:
    print(error)

# %%
# The fit at the start, where the threshold is above all outliers, and at the end.

times = np.linspace(-1, 1, 200)
curve = np.vander(times, 8, increasing=True)
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
axis.plot(train[0][:, 1], train[1], ".", color="0.6", label="training data, 25 outliers")
axis.plot(checked[0][:, 1], checked[1], "o", color="C2", markersize=4, label="checked by hand")
axis.plot(times, curve @ fit(np.zeros(8), theta0, train), "C1--", label="threshold at the start")
axis.plot(times, curve @ solution.x, "C0", label="threshold learned")
axis.set(xlabel="time", ylabel="value", ylim=(-2, 9))
axis.legend(loc="upper left")
plt.show()
