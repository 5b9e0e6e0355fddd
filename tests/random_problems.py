"""Random inner problems with answers in extended precision, for the property-based tests."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import bilevax as bx

# One compilation for each size; within it everything is data. What the library does depends on
# the size at 32 variables (up to there a Newton step is factorised) and at 256 (beyond it the
# evidence comes from iterative solvers): sizes in between repeat others, so most problems are
# small, also because the ill-conditioned ones take seconds in 200 variables.
# `many_random_problems.py` has more.
NUM_EXAMPLES = dict.fromkeys((1, 2, 7, 33, 80), 200) | {200: 8, 300: 8}
# A factorisation does not mind a large one; conjugate gradients in double precision do.
LOG_CONDITION = dict.fromkeys((1, 2, 7, 33, 80, 200), 8) | {300: 4}
NUM_OUTER = 3


class Data(NamedTuple):
    """`U = x'Ax/2 + s sum_i log cosh(c_i'x - theta_0) + x'B theta`, and the outer target."""

    A: np.ndarray
    B: np.ndarray
    c: np.ndarray
    s: np.ndarray
    target: np.ndarray
    modulus: np.ndarray


def inner(x, theta, data):
    t = data.c @ x - theta[0]
    # log cosh without overflow
    loss = jnp.abs(t) + jnp.log1p(jnp.exp(-2 * jnp.abs(t)))
    return 0.5 * x @ (data.A @ x) + data.s * jnp.sum(loss) + x @ (data.B @ theta)


def outer(x, theta, data):
    target = data.target
    return 0.5 * jnp.sum((x - target) ** 2) + 0.1 * jnp.sum(jnp.sin(x)) + 0.05 * jnp.sum(theta**2)


def draw(
    seed: int, size: int, log_condition: float, nonlinearity: float
) -> tuple[Data, np.ndarray]:
    """A strongly convex problem, and a theta."""
    random = np.random.default_rng([seed, size])
    q, _ = np.linalg.qr(random.normal(size=(size, size)))
    exponents = random.uniform(-log_condition, 0, size)
    exponents[0], exponents[-1] = 0, -log_condition
    eigenvalues = 10.0**exponents
    A = (q * eigenvalues) @ q.T
    A = (A + A.T) / 2
    data = Data(
        A=A,
        B=random.normal(size=(size, NUM_OUTER)) * random.choice([0.01, 1.0]),
        c=random.normal(size=(4, size)) / np.sqrt(size),
        s=np.asarray(nonlinearity),
        target=random.normal(size=size),
        modulus=np.asarray(0.99 * eigenvalues.min()),
    )
    return data, random.normal(size=NUM_OUTER)


def problem(data: Data) -> bx.Bilevel:
    """As bilevax sees it; the modulus is data too."""
    arrays = Data(*(jnp.asarray(a) for a in data))
    condition = bx.Minimum(inner, arrays, strong_convexity=arrays.modulus)
    return bx.Bilevel(condition, outer, outer_data=arrays)


def solve_extended(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`A^{-1} b` in extended precision, by refinement of a solution in double precision."""
    b = np.asarray(b, np.longdouble)
    factor = np.linalg.inv(A.astype(np.float64)).astype(np.longdouble)
    v = factor @ b
    for _ in range(8):  # each gains the digits that double precision has left: 16 - 8 here
        v = v + factor @ (b - A @ v)
    return v


def exact(data: Data, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x*` and the hypergradient, in extended precision."""
    A, B, c, s, target, _ = (np.asarray(a, np.longdouble) for a in data)
    theta = np.asarray(theta, np.longdouble)
    x = np.zeros(len(A), np.longdouble)

    def objective(x):
        t = np.abs(c @ x - theta[0])
        return x @ (A @ x) / 2 + s * np.sum(t + np.log1p(np.exp(-2 * t))) + x @ (B @ theta)

    last = np.inf
    for _ in range(200):
        u = np.tanh(c @ x - theta[0])
        gradient = A @ x + s * (c.T @ u) + B @ theta
        hessian = A + s * (c.T * (1 - u**2)) @ c
        # In double precision, because Newton's method corrects itself.
        step = np.linalg.solve(*(np.asarray(a, float) for a in (hessian, gradient)))
        step = step.astype(np.longdouble)
        length, f, slope = np.longdouble(1), objective(x), gradient @ step
        # At the minimum, or so near that its decrease drowns in rounding.
        is_near = slope <= 1e-16 * abs(f) or np.linalg.norm(step) <= 1e-5 * np.linalg.norm(x)
        # Where every tanh is flat, Newton's step overshoots by the condition number.
        while not is_near and objective(x - length * step) > f - length * slope / 10:
            length = length / 2
        x = x - length * step
        size = np.linalg.norm(step)
        if size <= 1e-9 * np.linalg.norm(x) and size >= 0.5 * last:
            break  # down to rounding
        last = size
    else:
        raise AssertionError("The exact solution was not found.")
    u = np.tanh(c @ x - theta[0])
    hessian = A + s * (c.T * (1 - u**2)) @ c
    v = solve_extended(hessian, x - target + np.cos(x) / 10)
    cross = B.copy()
    cross[:, 0] -= s * (c.T @ (1 - u**2))
    grad = theta / 10 - cross.T @ v
    return x, grad.astype(np.float64)


class Quadratic(NamedTuple):
    """`U = x'Ax/2 + x'B theta + c'x`, `L = ||x - target||^2/2 + ||theta||^2/20`."""

    A: np.ndarray
    B: np.ndarray
    c: np.ndarray
    target: np.ndarray


def quadratic_inner(x, theta, data):
    return 0.5 * x @ (data.A @ x) + x @ (data.B @ theta) + data.c @ x


def quadratic_outer(x, theta, data):
    return 0.5 * jnp.sum((x - data.target) ** 2) + 0.05 * jnp.sum(theta**2)


def quadratic_problem(data: Quadratic, dtype=jnp.float64) -> bx.Bilevel:
    arrays = Quadratic(*(jnp.asarray(a, dtype) for a in data))
    return bx.Bilevel(quadratic_inner, quadratic_outer, arrays, arrays)


def draw_singular(
    seed: int, size: int, num_outer: int, log_condition: float, inconsistency: float
) -> tuple[Quadratic, np.ndarray, np.ndarray, np.ndarray]:
    """A singular positive semidefinite problem; theta, `x*` and the hypergradient.

    `A = R'R`, `R` of fewer rows than columns. With `inconsistency` the linear term leaves
    the range of `A` as soon as theta moves: at this theta there are solutions, at others
    there are none.
    """
    random = np.random.default_rng([seed, size])
    rank = int(random.integers(1, size))
    u, _, vt = np.linalg.svd(random.normal(size=(rank, size)), full_matrices=False)
    R = (u * 10.0 ** random.uniform(-log_condition / 2, 0, rank)) @ vt
    theta, target = random.normal(size=num_outer), random.normal(size=size)
    B = R.T @ (R @ random.normal(size=(size, num_outer)))
    c = R.T @ random.normal(size=rank)
    outside = random.normal(size=(size, num_outer))
    outside = inconsistency * (outside - vt.T @ (vt @ outside))
    B, c = B + outside, c - outside @ theta

    long = R.astype(np.longdouble)
    gram = long @ long.T

    def pseudo_inverse(b: np.ndarray) -> np.ndarray:
        return long.T @ solve_extended(gram, solve_extended(gram, long @ b))

    x = -pseudo_inverse(B @ theta + c)
    grad = 0.1 * theta - B.T.astype(np.longdouble) @ pseudo_inverse(x - target)
    data = Quadratic(R.T @ R, B, c, target)
    return data, theta, x.astype(float), grad.astype(float)


def draw_indefinite(
    seed: int, size: int, num_outer: int, log_condition: float
) -> tuple[Quadratic, np.ndarray, np.ndarray]:
    """A problem with one negative eigenvalue or more; theta and the stationary point."""
    random = np.random.default_rng([seed, size])
    q, _ = np.linalg.qr(random.normal(size=(size, size)))
    eigenvalues = 10.0 ** random.uniform(-log_condition, 0, size)
    eigenvalues[: int(random.integers(1, size + 1))] *= -1
    A = (q * eigenvalues) @ q.T
    data = Quadratic(
        (A + A.T) / 2,
        random.normal(size=(size, num_outer)),
        random.normal(size=size),
        random.normal(size=size),
    )
    theta = random.normal(size=num_outer)
    return data, theta, np.linalg.solve(data.A, -(data.B @ theta + data.c))
