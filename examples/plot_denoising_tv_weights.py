"""
Total variation with a learned map of weights
=============================================

Total variation removes noise and keeps edges: it takes an image near to the noisy one whose
neighbours differ little. How little is one number for the whole image or, here, a map: much
weight where the image is smooth, little where it has texture. The map is learned from one noisy
picture of a pagoda and its clean original, and tried on the same picture with other noise.

In two dimensions the exact problem has no proximal step in closed form. Its dual is a quadratic
function in a box, and the map is the bound of the box. The usual way round is to smooth the
absolute value; the two are shown side by side.

Reference: Chambolle, "An algorithm for total variation minimization and applications", 2004, for
the dual (of the isotropic variation; here it is the anisotropic one).
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import bilevax as bx

jax.config.update("jax_enable_x64", True)

size = 64
photograph = load_sample_image("china.jpg").mean(axis=2)[:256, 200:456] / 255
clean = jnp.asarray(photograph.reshape(size, 4, size, 4).mean(axis=(1, 3)))
random = np.random.default_rng(0)
noisy, other = (clean + 0.1 * random.normal(size=clean.shape) for _ in range(2))


def quality(x):
    """The peak signal-to-noise ratio, in decibels."""
    return float(-10 * jnp.log10(jnp.mean((x - clean) ** 2)))


# %%
# The map has 36 parameters: a grid of 6 by 6 logarithms, interpolated to the pixels. Each pair of
# neighbours, across or down, has the mean weight of its two pixels.

num = 6


def map_of(theta):
    return jnp.exp(jax.image.resize(theta, (size, size), "linear"))


def weights(theta):
    w = map_of(theta)
    return 0.5 * (w[:, 1:] + w[:, :-1]), 0.5 * (w[1:] + w[:-1])


def differences(x):
    return x[:, 1:] - x[:, :-1], x[1:] - x[:-1]


def error(x):
    return 0.5 * jnp.sum((x - clean) ** 2)


# %%
# The primal problem is `min_x ||x - noisy||^2 / 2 + sum w |differences(x)|`. The dual has an
# unknown p for every pair, at most its weight in size, and the image is `noisy - differences^T p`.
# Where `|p|` is below the weight the two neighbours are equal, exactly.
#
# The image is unique, and p is not: it may run in circles. Often one of these p touches a bound
# that another one does not, and this is a kink of p, although the image may move smoothly.
# A little of `||p||^2` makes p unique. It is no longer quite the same problem: in the primal it
# rounds the corner of the absolute value, for differences below `ridge` times the weight, here
# some hundredths of a grey level of 255.

_, transposed = jax.vjp(differences, jnp.zeros((size, size)))


def image(p, noisy):
    return noisy - transposed(p)[0]


def dual(p, theta, data):
    noisy, ridge = data
    return 0.5 * jnp.sum(image(p, noisy) ** 2) + 0.5 * ridge * sum(jnp.sum(q**2) for q in p)


def outer(p, theta, pixels):
    return error(image(p, pixels.reshape(size, size)))


def exact(noisy, ridge):
    box = bx.prox.Box(lambda theta: jax.tree.map(jnp.negative, weights(theta)), weights)
    # The curvature of the dual is at most 8.
    inner = bx.ProximalMinimum(dual, box, (noisy, ridge), step_size=1 / 8)
    return bx.Bilevel(inner, outer, outer_data=noisy.ravel())  # as many examples as pixels


p0 = differences(jnp.zeros((size, size)))
tight = {
    "inner_solver": bx.ProximalNewton(rtol=1e-12),
    "rule": bx.Implicit(bx.linear.CG(rtol=1e-10)),
}


@jax.jit
def at(theta, noisy, ridge):
    return bx.hypergradient(exact(noisy, ridge), p0, theta, throw=False, **tight)[0]


# %%
# The best constant weight of a few is where the map starts. A run meets kinks on its way: there
# it goes on by the one-sided derivative.

ridge = 1e-3
constants = [jnp.full((num, num), level) for level in np.linspace(-3.5, -2, 7)]
start = min(constants, key=lambda theta: at(theta, noisy, ridge).value)
method = bx.DoubleLoop(bx.ProximalNewton(rtol=1e-8), optimizer=bx.OuterLBFGS())
learned = bx.solve(exact(noisy, ridge), p0, start, method, num_steps=20)
print("exact:", learned)

# %%
# The hypergradient at the constant weight and at the learned map, against central differences in a
# random direction; with the ridge, and without. Without it the outcome is `at_kink`: nothing but
# the image reaches the outer objective, and its derivative agrees with the differences, but that of
# p is not single, and the flag is about p.

direction = jnp.asarray(random.normal(size=(num, num)))
h = 1e-5  # where the image has few kinks in between, and rounding is small
for name, theta in (("constant weight", start), ("learned map", learned.theta)):
    for r in (ridge, 0.0):
        found = at(theta, noisy, r)
        slope = (
            at(theta + h * direction, noisy, r).value - at(theta - h * direction, noisy, r).value
        )
        relative = abs(jnp.sum(found.grad * direction) / (slope / (2 * h)) - 1)
        print(f"{name:15}, ridge {r:5}: {found.result.name:10}, relative error {relative:.0e}")

# %%
# The smoothed problem has x itself as its unknown, and is an ordinary minimum.


def smoothed(x, theta, noisy):
    pairs = zip(weights(theta), differences(x), strict=True)
    variation = sum(jnp.sum(w * jnp.sqrt(d**2 + 0.01**2)) for w, d in pairs)
    return 0.5 * jnp.sum((x - noisy) ** 2) + variation


smooth_problem = bx.Bilevel(bx.Minimum(smoothed, noisy), lambda x, theta: error(x))
smooth_method = bx.DoubleLoop(optimizer=bx.OuterLBFGS())
smooth = bx.solve(smooth_problem, noisy, start, smooth_method, num_steps=20)
print("smoothed:", smooth)

# %%
# On the other noise. Equal neighbours are what distinguishes the exact solution. By its error the
# smoothed one is a little better: it makes no stairs of a gentle slope.

by_constant = at(start, other, ridge)
by_map = at(learned.theta, other, ridge)
without_ridge = image(at(learned.theta, other, 0.0).x, other)
images = {
    "other noise": other,
    "best constant weight": image(by_constant.x, other),
    "learned map, exact": image(by_map.x, other),
    "learned map, smoothed": bx.argmin(bx.Minimum(smoothed, other))(other, smooth.theta),
}
print("on the other noise       decibels   pairs of neighbours that are equal")
for name, x in images.items():
    steps = np.concatenate([np.ravel(d) for d in differences(x)])
    share = np.mean(np.abs(steps) < 1e-3)  # a quarter of a grey level
    print(f"  {name:22} {quality(x):8.2f} {share:12.0%}")
grey = 255 * jnp.max(jnp.abs(without_ridge - images["learned map, exact"]))
print(f"without the ridge the image differs by at most {grey:.2f} grey levels of 255")

# %%
figure, axes = plt.subplots(2, 4, figsize=(13, 6.6), layout="constrained")
shown = {"clean": clean, **images}
places = (axes[0, 0], axes[0, 1], axes[0, 2], axes[1, 0], axes[1, 1])
for ax, (name, x) in zip(places, shown.items(), strict=True):
    ax.imshow(x, cmap="gray", vmin=0, vmax=1)
    ax.set_title(name if name == "clean" else f"{name}: {quality(x):.1f} dB", fontsize=10)
drawn = axes[0, 3].imshow(map_of(learned.theta), norm="log", cmap="viridis")
axes[0, 3].set_title("the learned map of weights", fontsize=10)
figure.colorbar(drawn, ax=axes[0, 3], ticks=[0.03, 0.1, 0.3], format="%g")
drawn.colorbar.ax.minorticks_off()
row = 12
axes[0, 0].axhline(row, color="tab:red", lw=1)
for ax in (*places, axes[0, 3]):
    ax.set(xticks=[], yticks=[])
line = axes[1, 2]
line.plot(other[row], ".", color="0.75", ms=3, label="other noise")
line.plot(clean[row], "k", lw=1, label="clean")
line.plot(images["learned map, smoothed"][row], color="tab:orange", label="smoothed")
line.plot(images["learned map, exact"][row], color="tab:blue", label="exact")
line.set(title="along the red line", xlabel="pixel", ylim=(0.65, 1.1))
line.legend(fontsize=8, loc="lower right")
for name, run in (("exact", learned), ("smoothed", smooth)):
    axes[1, 3].plot(-10 * np.log10(2 * run.history.value / size**2), label=name)
axes[1, 3].set(title="while learning", xlabel="outer step", ylabel="decibels")
axes[1, 3].legend()
plt.show()
