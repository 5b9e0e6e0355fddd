"""
Parameters of a simulator
=========================

A rod carries heat. How its conductivity changes with the temperature nobody knows, nor where the
heater sits, nor how strong it is. Seven thermometers measure the steady state. The simulator
solves the discretised balance of heat,

.. math:: -\\big(k(u)\\, u'\\big)' = q(s), \\qquad u = 0 \\text{ at both ends},

which is no minimum but an equation: the condition `Root`. Newton's method solves it, the outer
problem fits the thermometers, and the hypergradient is what engineers call the adjoint method.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevax as bx

jax.config.update("jax_enable_x64", True)

num_points = 60
spacing = 1 / (num_points + 1)
places = jnp.linspace(spacing, 1 - spacing, num_points)
sensors = jnp.array([5, 13, 21, 29, 37, 45, 53])


def conductivity(u, theta):
    return jnp.exp(theta["log_conductivity"] + theta["slope"] * u)


def heater(theta):
    return jnp.exp(theta["log_power"] - 0.5 * ((places - theta["place"]) / 0.05) ** 2)


def balance(u, theta):
    """Heat in minus heat out of each cell: zero in the steady state."""
    padded = jnp.pad(u, 1)
    between = 0.5 * (padded[1:] + padded[:-1])
    flux = -conductivity(between, theta) * jnp.diff(padded) / spacing
    return jnp.diff(flux) / spacing - heater(theta)


# %%
# The truth, and measurements with an error of 0.01. The steady state only knows the power
# relative to the conductivity, so one of them must be known: here the conductivity of the cold
# rod.

truth = {"slope": -0.5, "place": 0.35, "log_power": 3.5}
steady_state = bx.argmin(bx.Root(balance))
field = steady_state(jnp.zeros(num_points), {"log_conductivity": 0.0, **truth})
readings = field[sensors] + 0.01 * np.random.default_rng(0).normal(size=len(sensors))


def simulator(u, theta):
    return balance(u, {"log_conductivity": 0.0, **theta})


def misfit(u, theta, readings):
    return 0.5 * jnp.sum((u[sensors] - readings) ** 2)


# %%
# The inner solver is Newton's method, the default for a `Root`, started each time at the last
# steady state.

problem = bx.Bilevel(bx.Root(simulator), misfit, outer_data=readings)
theta0 = {"slope": 0.0, "place": 0.5, "log_power": 3.0}
method = bx.DoubleLoop(optimizer=optax.adam(0.03))
solution = bx.solve(problem, jnp.zeros(num_points), theta0, method, num_steps=250)
print(solution)

print("\n               first guess  estimate     truth")
for name, value in solution.theta.items():
    print(f"{name:14}{theta0[name]:10.3f}{value:12.4f}{truth[name]:10.3f}")

# %%
# The Jacobian `D x*` answers more questions: how far errors of the thermometers move the
# estimates, for one.

jacobian = bx.jacobian(problem, solution.x, solution.theta).value
sensitivity = np.stack([np.asarray(jacobian[name])[sensors] / 0.01 for name in theta0], axis=1)
deviation = np.sqrt(np.diag(np.linalg.inv(sensitivity.T @ sensitivity)))
print("standard errors:", dict(zip(theta0, deviation.round(4).tolist(), strict=True)))

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
start = steady_state(jnp.zeros(num_points), {"log_conductivity": 0.0, **theta0})
axes[0].plot(places, start, "C7--", label="first guess")
axes[0].plot(places, field, "k", label="truth")
axes[0].plot(places, solution.x, "C1--", label="estimate")
axes[0].plot(places[sensors], readings, "o", label="thermometers")
axes[0].set(xlabel="place on the rod", ylabel="temperature")
axes[0].legend()
axes[1].semilogy(solution.history.value, label="misfit")
axes[1].set(xlabel="outer step", ylabel="misfit")
plt.show()
