"""Quadratic programs, written by their matrices."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from ._constrained import ConstrainedMinimum

_Setting = Any  # an array, or a function of theta


def QP(  # noqa: N802
    Q: _Setting = None,
    q: _Setting = None,
    A: _Setting = None,
    b: _Setting = None,
    G: _Setting = None,
    h: _Setting = None,
    *,
    data: PyTree = None,
    with_multipliers: bool = False,
) -> ConstrainedMinimum:
    """`x*(theta)` minimises `1/2 x'Qx + q'x` where `Ax = b` and `Gx <= h`.

    **Arguments:**

    - `Q`, `q`: the objective, of shapes `(n, n)` and `(n,)`; without `Q` a linear program.
    - `A`, `b`: the equations, of shapes `(p, n)` and `(p,)` or a number.
    - `G`, `h`: the inequalities, of shapes `(m, n)` and `(m,)` or a number.
    - `data`, `with_multipliers`: as in `ConstrainedMinimum`.

    Each is an array or a function of theta or, with data, of `(theta, data)`; x is one array.
    Of `Q` the symmetric part counts, which must be positive semidefinite.

    **Returns:** the `bx.ConstrainedMinimum` of these functions, with its outcomes. Up to 2,000
    variables and multipliers `bx.InteriorPoint` solves it, inside JAX, on any device, in batches;
    beyond, `bx.Clarabel` on the host. `bx.OSQP` and `bx.QPax` are there by name.

    **Cost:** the Hessian and the derivatives of the constraints are formed once, a step of
    the solver factorises a matrix of the size of x.

    **Exact when** the active constraints are independent, none is weakly active, and `Q` is
    definite along them. At a vertex x does not move with `q`.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        shares = bx.QP(
            Q=lambda theta: jnp.diag(theta["risk"]),
            q=lambda theta: -theta["gain"],
            A=jnp.ones((1, 3)), b=1.0,
            G=-jnp.eye(3), h=0.0,
        )
        theta = {"risk": jnp.array([1.0, 2.0, 0.5]), "gain": jnp.array([0.1, 0.3, 0.9])}
        x = bx.argmin(shares)(jnp.full(3, 1 / 3), theta)
        ```

    Reference: Boyd and Vandenberghe, "Convex optimization", 2004, section 4.4.
    """
    if Q is None and q is None:
        raise TypeError("bx.QP needs an objective: Q, q, or both.")
    for left, right, names in ((A, b, "A and b"), (G, h, "G and h")):
        if (left is None) != (right is None):
            raise TypeError(f"bx.QP takes {names} together; one of them is missing.")

    def objective(x: Array, theta: PyTree, *more: PyTree) -> Scalar:
        value = jnp.zeros((), x.dtype)
        if Q is not None:
            value += 0.5 * x @ (_at(Q, theta, more) @ x)
        return value if q is None else value + _at(q, theta, more) @ x

    def affine(left: _Setting, right: _Setting) -> Callable | None:
        def fn(x: Array, theta: PyTree, *more: PyTree) -> Array:
            return _at(left, theta, more) @ x - _at(right, theta, more)

        return None if left is None else fn

    return ConstrainedMinimum(
        objective,
        equality=affine(A, b),
        inequality=affine(G, h),
        data=data,
        with_multipliers=with_multipliers,
    )


def _at(setting: _Setting, theta: PyTree, data: tuple[PyTree, ...]) -> Array:
    return jnp.asarray(setting(theta, *data) if callable(setting) else setting)
