"""The problem of most benchmarks: logistic regression, one l2 strength per feature."""

from typing import Any, NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """Training samples, features, validation samples."""

    num_samples: int
    num_features: int
    num_validation: int


def parse_sizes(text: str) -> list[Sizes]:
    """`"2000x100,20000x1000"`; a quarter as many validation samples, at least 50."""
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    return [Sizes(n, d, max(n // 4, 50)) for n, d in pairs]


def make_data(sizes: Sizes, dtype: str) -> tuple[Any, Any, np.ndarray]:
    """Training and validation data `(A, y)`, and theta: NumPy arrays.

    The scale of the features falls from 1 to 0.1, a tenth of them carries the signal, and
    the strengths `exp(theta)` go from 0.001 to 0.02.
    """
    n, d, m = sizes
    rng = np.random.default_rng(0)
    scale = np.logspace(0.0, -1.0, d).astype(dtype)
    A = rng.standard_normal((n + m, d), dtype=dtype)
    A *= scale
    x = np.zeros(d, dtype)
    x[:: max(d // 10, 1) if d < 100 else 10] = 1.0
    x *= 3.0 / np.linalg.norm(scale * x)
    y = np.sign(A @ x + rng.standard_normal(n + m)).astype(dtype)
    theta = np.linspace(-7.0, -4.0, d).astype(dtype)
    return (A[:n], y[:n]), (A[n:], y[n:]), theta


def inner(x: Any, theta: Any, data: Any) -> Any:
    """What a user of any of the libraries writes."""
    import jax.numpy as jnp

    A, y = data
    loss = jnp.mean(jnp.logaddexp(0.0, -y * (A @ x)))
    return loss + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def outer(x: Any, theta: Any, data: Any) -> Any:
    """Mean validation loss."""
    import jax.numpy as jnp

    del theta
    A, y = data
    return jnp.mean(jnp.logaddexp(0.0, -y * (A @ x)))


class NumPySolution(NamedTuple):
    """What the NumPy version found."""

    value: float
    grad: np.ndarray
    x: np.ndarray
    v: np.ndarray
    num_products: int


def numpy_hypergradient(
    train: Any,
    validation: Any,
    theta: np.ndarray,
    tolerance: float,
    rtol: float,
    x: np.ndarray | None = None,
    v: np.ndarray | None = None,
) -> NumPySolution:
    """Newton-CG and CG with analytic derivatives, in the precision of the data.

    Stops at a gradient norm of `tolerance` and an adjoint residual of `rtol`. With tight
    ones in float64 it is the reference of every error.
    """
    (A, y), (B, z) = train, validation
    strength, num_products = np.exp(theta), 0
    x = np.zeros(A.shape[1], A.dtype) if x is None else x

    def losses(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        margin = y * (A @ x)
        miss = 1 / (1 + np.exp(margin))
        value = np.mean(np.logaddexp(0, -margin)) + 0.5 * np.sum(strength * x * x)
        gradient = -(miss * y) @ A / len(y) + strength * x
        return float(value), gradient, miss * (1 - miss) / len(y)

    value, gradient, weight = losses(x)
    first = np.linalg.norm(gradient)
    while (norm := np.linalg.norm(gradient)) > tolerance:
        goal = max(0.5 * tolerance, norm * min(0.1, np.sqrt(norm / first)))
        step, count = numpy_cg(A, weight, strength, -gradient, goal)
        num_products += count
        length = 1.0
        while True:
            new_value, gradient, weight = losses(x + length * step)
            # level to rounding is good enough: near the minimum the gradient decides
            if new_value <= value + 1e-6 * abs(value) or length < 1e-6:
                break
            length /= 2
        x, value = x + length * step, new_value

    margin = z * (B @ x)
    miss = 1 / (1 + np.exp(margin))
    b = -(miss * z) @ B / len(z)
    v, count = numpy_cg(A, weight, strength, b, rtol * np.linalg.norm(b), v)
    loss = float(np.mean(np.logaddexp(0, -margin)))
    return NumPySolution(loss, -strength * x * v, x, v, num_products + count)


def numpy_cg(
    A: np.ndarray,
    weight: np.ndarray,
    strength: np.ndarray,
    b: np.ndarray,
    goal: float,
    v: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """`(A' diag(weight) A + diag(strength)) v = b` to a residual norm of `goal`."""

    def product(p: np.ndarray) -> np.ndarray:
        return (weight * (A @ p)) @ A + strength * p

    r, count = (b.copy(), 0) if v is None else (b - product(v), 1)
    v = np.zeros_like(b) if v is None else v.copy()
    p, rr = r.copy(), r @ r
    while np.sqrt(rr) > goal and count < 10_000:
        q = product(p)
        alpha = rr / (p @ q)
        v += alpha * p
        r -= alpha * q
        rr, old = r @ r, rr
        p = r + (rr / old) * p
        count += 1
    return v, count


def reference(train: Any, validation: Any, theta: np.ndarray, start: Any) -> NumPySolution:
    """The hypergradient to about nine digits, in float64, from a float32 solution `(x, v)`."""
    train, validation = (
        tuple(np.asarray(a, np.float64) for a in level) for level in (train, validation)
    )
    x, v = (np.asarray(a, np.float64) for a in start)
    theta = np.asarray(theta, np.float64)
    gradient_scale = float(np.linalg.norm(train[0].T @ train[1])) / len(train[1])
    return numpy_hypergradient(train, validation, theta, 1e-10 * gradient_scale, 1e-9, x, v)


def relative_error(a: Any, b: Any) -> float:
    """`||a - b|| / ||b||` in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
