"""
Tolls that clear a bridge
=========================

Every driver takes the way that is shortest for him, given the traffic, and delays all others. The
flows of such a game, a traffic equilibrium, minimise a convex function over flows that are not
negative and add up to the demand. That is the inner problem. The outer one chooses tolls on a few
roads so that all together lose the least time. How the equilibrium moves with a toll is known as
long as the same ways stay in use; where one is about to be given up, the outcome says so.

Reference: Beckmann, McGuire and Winsten, "Studies in the economics of transportation", 1956, for
the function; Braess, "Über ein Paradoxon aus der Verkehrsplanung", 1968.
"""

import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevax as bx

jax.config.update("jax_enable_x64", True)

# %%
# Braess' network first, where everything is known in closed form. Six thousand cars want from
# left to right, over the top, over the bottom, or from top to bottom by a short cut. The minutes
# on a road are `free + slope * flow`. Beckmann's function is the integral of the minutes, so that
# its derivative in the flow of a way is the time of that way, and at the minimum over a simplex
# all ways in use take the same time. A toll, in minutes, is added to the road it is paid on.

ways = jnp.array([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1], [1, 0, 1, 0, 1]])  # of five roads
free = jnp.array([0.0, 50, 10, 50, 0])
slope = jnp.array([10.0, 1, 1, 1, 10])


def braess_beckmann(x, toll):
    flow = x @ ways
    return jnp.sum(free * flow + 0.5 * slope * flow**2) + toll * flow[2]


def braess_total(x, toll):
    flow = x @ ways
    return jnp.sum(flow * (free + slope * flow))


exact = bx.ProximalNewton(rtol=1e-11)
braess = bx.Bilevel(bx.ProximalMinimum(braess_beckmann, bx.prox.Simplex(6.0)), braess_total)


@jax.jit
@jax.vmap
def braess_at(toll):
    return bx.hypergradient(braess, jnp.full(3, 2.0), toll, inner_solver=exact, throw=False)[0]


tolls = jnp.linspace(0, 18, 37)
found = braess_at(tolls)
is_right = np.asarray(found.result == bx.RESULTS.successful)
shortcut = jnp.maximum(2 - tolls / 6.5, 0)
slopes = jnp.where(tolls < 13, -(14 + 13 * shortcut) / 6.5, 0)  # of 498 + 14 m + 6.5 m^2
error = np.abs(found.grad - slopes)[is_right].max()
print("Braess: thousands of minutes lost by all, and what a minute more of toll changes")
for i in (0, 24, 26, 28):
    one = jax.tree.map(lambda a, i=i: a[i], found)
    print(f"  toll {tolls[i]:4.1f}: {one.value:.1f}, {one.grad:6.3f}, {one.result.name}")
print(f"largest error of the {is_right.sum()} hypergradients not flagged: {error:.0e}")

# %%
# A town on the east bank of a river, in the morning: 4,500 cars an hour come from the west, to one
# of three bridges, and from its end to the centre. The middle bridge is short, the outer ones are
# long. The minutes on a road grow with the fourth power of its flow, the usual formula. There are
# 27 ways. Several mixtures of them give the same flows on the roads, so that the Hessian of
# Beckmann's function in x is singular; the flows on the roads are unique, and the outer objective
# sees nothing else of x. The adjoint system then has a solution, and any will do.

places = {"home": (-1.6, 1), "centre": (4.6, 1)}
places |= {f"{bank}{i}": (x, 2 - i) for bank, x in (("W", 0), ("E", 3)) for i in range(3)}
# from, to, minutes when empty, flow at which it takes 15 % longer; in hundreds of cars an hour
roads = [("home", "W0", 5, 17), ("home", "W1", 3, 29), ("home", "W2", 8, 27)]
roads += [(a, b, 2, 20) for i in "02" for a, b in ((f"W{i}", "W1"), ("W1", f"W{i}"))]
roads += [("W0", "E0", 15, 14), ("W1", "E1", 2, 19), ("W2", "E2", 11, 21)]
roads += [(a, b, 3, 20) for i in "02" for a, b in ((f"E{i}", "E1"), ("E1", f"E{i}"))]
roads += [("E0", "centre", 4, 28), ("E1", "centre", 2, 12), ("E2", "centre", 5, 25)]
ends = [road[:2] for road in roads]
minutes, capacity = (jnp.array([road[i] for road in roads], float) for i in (2, 3))
is_bridge = jnp.array([a[0] + b[0] == "WE" for a, b in ends])
demand = 45.0


def along(bank, i, j):
    """The places on a bank from one to another."""
    return [f"{bank}{k}" for k in range(i, j, 1 if j > i else -1)] + [f"{bank}{j}"]


def way(west, bridge, east):
    """Which roads a way takes: where it reaches the river, crosses it, and leaves it."""
    stops = ["home", *along("W", west, bridge), *along("E", bridge, east), "centre"]
    hops = list(itertools.pairwise(stops))
    return [float(end in hops) for end in ends]


incidence = jnp.array([way(*choice) for choice in itertools.product(range(3), repeat=3)])
x0 = jnp.full(27, demand / 27)


def all_time(x):
    """Of all cars together, in hours lost in an hour."""
    flow = x @ incidence
    return 100 / 60 * jnp.sum(flow * minutes * (1 + 0.15 * (flow / capacity) ** 4))


def beckmann(x, theta, is_tolled):
    flow = x @ incidence
    toll = jnp.where(is_tolled, jax.nn.softplus(theta), 0)  # in minutes, never negative
    return jnp.sum(minutes * (flow + 0.03 * capacity * (flow / capacity) ** 5) + toll * flow)


def town(is_tolled):
    equilibrium = bx.ProximalMinimum(beckmann, bx.prox.Simplex(demand), is_tolled)
    return bx.Bilevel(equilibrium, lambda x, theta: all_time(x))


only_bridges, everywhere = town(is_bridge), town(jnp.ones_like(is_bridge))


@jax.jit
def at(theta):
    return bx.hypergradient(everywhere, x0, theta, inner_solver=exact, throw=False)[0]


# %%
# The hypergradient against central differences, at a random theta.

theta = 2 * jnp.asarray(np.random.default_rng(0).normal(size=len(roads)))
estimate = at(theta)
h = 1e-4  # about the cube root of the error of the values
differences = np.array(
    [(at(theta + h * e).value - at(theta - h * e).value) / (2 * h) for e in np.eye(len(roads))]
)
error = np.linalg.norm(estimate.grad - differences) / np.linalg.norm(differences)
print(estimate)
print(f"relative difference from central differences: {error:.0e}")

# %%
# What is the best that could be done, if drivers went where they are told? The minimum of the time
# itself over the simplex. It is also an equilibrium, under tolls that charge on every road what a
# driver costs the others, the flow times the derivative of the minutes. Neither needs a
# hypergradient, and both say what the bilevel problem should find with a toll on every road.

told = bx.argmin(bx.ProximalMinimum(lambda x, _: all_time(x), bx.prox.Simplex(demand)), exact)
best = told(x0, jnp.zeros(()))
cost_to_others = 0.6 * minutes * ((best @ incidence) / capacity) ** 4
charged = at(jnp.log(jnp.expm1(jnp.maximum(cost_to_others, 1e-12))))
untolled = at(jnp.full(len(roads), -40.0))

# %%
# The bilevel problem knows nothing of this. It has many local optima: the toll on a road that
# nobody takes changes nothing, and the hypergradient, which is right, is zero in it. A run takes a
# few hundredths of a second, so there are forty random starts. Where a run meets a kink on its
# way, it goes on by the one-sided derivative, and the evaluation is flagged.

method = bx.DoubleLoop(exact, optimizer=bx.OuterLBFGS())
random = np.random.default_rng(1)
starts = [jnp.asarray(random.uniform(-4, 2, len(roads))) for _ in range(40)]
runs = {}
for name, problem in (("on the bridges", only_bridges), ("on every road", everywhere)):
    every = [bx.solve(problem, x0, theta, method, num_steps=80) for theta in starts]
    runs[name] = sorted(every, key=lambda solution: float(solution.value))

print("hours lost by all in an hour")
print(f"  no tolls                             {untolled.value:6.1f}")
for name, (first, *_) in runs.items():
    print(f"  learned tolls {name:22} {first.value:6.1f}")
print(f"  tolls of what the others lose        {charged.value:6.1f}")
print(f"  every driver told where to go        {all_time(best):6.1f}")
for name, every in runs.items():
    ends = np.array([float(run.value) for run in every])
    results = np.concatenate([run.history.result for run in every])
    flagged = dict(zip(*np.unique(results, return_counts=True), strict=True))
    print(f"\n{name}, 40 starts: {np.percentile(ends, (0, 25, 50, 75, 100)).round(1)} (quartiles)")
    print(f"evaluations: {', '.join(f'{v} {k}' for k, v in flagged.items())}")
    print(every[0])

# %%
# The wider the line the more cars, the redder the longer than on an empty road. Without tolls all
# crowd on the middle bridge, and nobody takes the one above.

figure, axes = plt.subplot_mosaic(
    [["none", "bridges", "every"], ["steps", "steps", "braess"]],
    figsize=(13, 6.6),
    layout="constrained",
    height_ratios=(1.2, 1),
)


def draw(ax, x, theta, is_tolled, title):
    flow = np.asarray(x @ incidence)
    ax.axvspan(0.9, 2.1, color="tab:blue", alpha=0.12)
    ax.text(1.5, -0.45, "river", color="tab:blue", ha="center", va="center", style="italic")
    toll = np.asarray(jnp.where(is_tolled, jax.nn.softplus(theta), 0))
    late = 0.15 * (flow / np.asarray(capacity)) ** 4  # in parts of the minutes when empty
    for (a, b, *_), cars, charge, delay in zip(roads, flow, toll, late, strict=True):
        (x1, y1), (x2, y2) = places[a], places[b]
        ax.plot([x1, x2], [y1, y2], color="0.75", lw=0.8, zorder=1)
        if cars > 0.05:
            color = plt.colormaps["YlOrRd"](0.25 + 0.75 * min(delay / 2, 1))
            ax.plot(
                [x1, x2], [y1, y2], color=color, lw=cars / 2.5, zorder=2, solid_capstyle="round"
            )
            middle = ((x1 + x2) / 2, (y1 + y2) / 2)
            label = f"{100 * cars:.0f}" + (f"\ntoll {charge:.1f}" if charge > 0.05 else "")
            box = {"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.75}
            ax.text(*middle, label, fontsize=8, ha="center", va="center", zorder=4, bbox=box)
    for name, (px, py) in places.items():
        ax.plot(px, py, "ko", ms=10 if len(name) > 2 else 4, zorder=3)
        if len(name) > 2:
            ax.text(px, py - 0.25, name, ha="center", va="top")
    ax.set(title=title, ylim=(-0.6, 2.3), xlim=(-2.2, 5.2), xticks=[], yticks=[])


def named(name, value):
    return f"{name}: {value:.0f} hours lost"


by_bridge, by_road = (every[0] for every in runs.values())
never = jnp.zeros(len(roads), bool)
draw(axes["none"], untolled.x, starts[0], never, named("no tolls", untolled.value))
title = named("tolls on the bridges", by_bridge.value)
draw(axes["bridges"], by_bridge.x, by_bridge.theta, is_bridge, title)
title = named("tolls on every road", by_road.value)
draw(axes["every"], by_road.x, by_road.theta, ~never, title)

for color, (name, every) in zip(("tab:orange", "tab:green"), runs.items(), strict=True):
    for k, run in enumerate(every):
        label = f"tolls {name}, 40 starts" if k == 0 else None
        width, alpha = (2.5, 1) if k == 0 else (0.7, 0.4)
        axes["steps"].plot(run.history.value, color=color, lw=width, alpha=alpha, label=label)
axes["steps"].axhline(all_time(best), color="k", ls="--", label="the least there can be")
axes["steps"].set(xlabel="outer step", ylabel="hours lost in an hour", xlim=(0, 40))
axes["steps"].legend()

axes["braess"].plot(tolls, found.value, color="tab:blue")
axes["braess"].set(xlabel="toll on the short cut, in minutes", title="Braess' network")
axes["braess"].set_ylabel("all minutes, in thousands", color="tab:blue")
twin = axes["braess"].twinx()
for part, label in ((slice(26), "closed form"), (slice(26, None), None)):
    twin.plot(tolls[part], slopes[part], color="0.8", lw=4, label=label)
twin.plot(tolls[is_right], found.grad[is_right], "k.", label="hypergradient")
twin.plot([13, 13], [-14 / 6.5, 0], "rx", ms=8, label="flagged: at a kink")
twin.set(ylabel="derivative", ylim=(-7, 4))
twin.legend(loc="upper right")
plt.show()
