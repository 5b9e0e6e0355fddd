"""The nuclear norm, and terms of the user's own."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._tree import stop_gradient, tree_jump, tree_norm, tree_scale, tree_size, tree_weights
from ._base import (
    AbstractLeafwise,
    AbstractProx,
    Apart,
    LeafPiece,
    Piece,
    Settings,
    at_point,
    setting,
)
from ._sets import Box

# A jump of this part of the length of a direction is neither rounding nor curvature.
_JUMP = 1e-3


class Nuclear(AbstractLeafwise):
    """`strength sum of the singular values`, of a matrix: solutions of low rank.

    **Arguments:** `strength`: a number, or a function of theta that returns one. Not negative.

    The matrices of one rank are no plane: the adjoint system is that of the proximal step,
    which is not symmetric (`GMRES` by default). Second derivatives need singular values that
    differ.

    **Cost** of a proximal step, and of its derivative: a singular value decomposition.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.Nuclear(lambda theta: jnp.exp(theta))
        ```

    Reference: Cai, Candes and Shen, "A singular value thresholding algorithm for matrix
    completion", 2010.
    """

    settings: ClassVar[tuple[str, ...]] = ("strength",)
    has_pieces: ClassVar[bool] = False

    strength: PyTree = setting(1.0)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        (strength,) = at
        return strength * jnp.sum(jnp.linalg.svd(x, compute_uv=False))

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        (strength,) = at
        return _thresholded(z, step * strength)

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        raise NotImplementedError

    def is_near_kink(
        self, z: PyTree, step: Scalar, theta: PyTree, distance: Scalar
    ) -> Bool[Array, ""]:
        def of_leaf(leaf: Array, strength: Array) -> Bool[Array, ""]:
            gaps = jnp.abs(jnp.linalg.svd(leaf, compute_uv=False) - step * strength)
            return (strength > 0) & jnp.any(gaps <= distance)

        return jnp.any(jnp.stack([of_leaf(a, *at) for a, at in self._each(z, theta)]))

    def _check_shapes(self, leaves: list[Array], columns: list[list[Array]]) -> None:
        for leaf, strength in zip(leaves, columns[0], strict=True):
            if leaf.ndim != 2 or strength.ndim:
                raise ValueError(
                    "bx.prox.Nuclear(strength=...) takes matrices and one strength; got x of shape "
                    f"{leaf.shape} and a strength of shape {strength.shape}."
                )


@jax.custom_jvp
def _thresholded(z: Array, threshold: Scalar) -> Array:
    """`U max(s - threshold, 0) V'`."""
    u, s, vt = jnp.linalg.svd(z, full_matrices=False)
    return (u * jnp.maximum(s - threshold, 0)[None, :]) @ vt


@_thresholded.defjvp
def _thresholded_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """By the singular vectors, also where singular values are equal or zero.

    A function of the singular values: its divided differences weigh the symmetric part of
    `U' dz V`, those of its odd continuation the other part and what leaves the two spaces.
    """
    (z, threshold), (dz, dt) = primals, tangents
    u, s, vt = jnp.linalg.svd(z, full_matrices=False)
    f, slope = jnp.maximum(s - threshold, 0), (s > threshold).astype(z.dtype)
    core = u.T @ dz @ vt.T
    even, odd = 0.5 * (core + core.T), 0.5 * (core - core.T)
    rows, columns = s[:, None], s[None, :]
    is_tie = jnp.abs(rows - columns) <= 1e-9 * jnp.maximum(s[0], 1e-30)
    ratio = (f[:, None] - f[None, :]) / jnp.where(is_tie, 1, rows - columns)
    w_even = jnp.where(is_tie, jnp.broadcast_to(slope[:, None], core.shape), ratio)
    sums = rows + columns
    w_odd = (f[:, None] + f[None, :]) / jnp.where(sums > 0, sums, 1)
    outside = f / jnp.where(s > 0, s, 1)
    moved = u @ (w_even * even + w_odd * odd) @ vt
    left = dz @ vt.T
    moved += ((left - u @ core) * outside[None, :]) @ vt  # beyond the columns of U
    right = u.T @ dz
    moved += (u * outside[None, :]) @ (right - core @ vt)  # beyond the rows of V'
    moved -= dt * ((u * slope[None, :]) @ vt)
    return (u * f[None, :]) @ vt, moved


class Own(AbstractProx):
    """A term of your own, by its value and its proximal step.

    **Arguments:**

    - `value`: `(x, theta) -> scalar`.
    - `prox`: `(z, step, theta) -> x`, the minimiser of
        `value(x, theta) + ||x - z||^2 / (2 step)`, written in JAX and differentiable away
        from its kinks (its derivative is what the hypergradient is made of). What it depends on
        beside `z` and `step` comes in theta: it may close over constants only.

    The adjoint system is that of the proximal step, which is not symmetric (`GMRES` by
    default). `at_kink` is said where the derivative of the step jumps within the error of x. A
    set is one whose value is zero and whose step a projection, such as those of
    `optax.projections`.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        def prox(z, step, theta):  # of theta ||x||_1
            return jnp.sign(z) * jnp.maximum(jnp.abs(z) - step * theta, 0)

        penalty = bx.prox.Own(lambda x, theta: theta * jnp.sum(jnp.abs(x)), prox)
        ```
    """

    has_pieces: ClassVar[bool] = False

    value_fn: Apart
    prox_fn: Apart

    def __init__(self, value: Callable, prox: Callable) -> None:
        for name, fn in (("value", value), ("prox", prox)):
            if not callable(fn):
                raise TypeError(
                    f"bx.prox.Own({name}=...) must be a function; got {type(fn).__name__}."
                )
        self.value_fn = Apart(value)
        self.prox_fn = Apart(prox)

    def value(self, x: PyTree, theta: PyTree) -> Scalar:
        return self.value_fn.fn(x, at_point(x, theta).theta)

    def prox(self, z: PyTree, step: Scalar, theta: PyTree) -> PyTree:
        return self.prox_fn.fn(z, step, at_point(z, theta).theta)

    def is_near_kink(
        self, z: PyTree, step: Scalar, theta: PyTree, distance: Scalar
    ) -> Bool[Array, ""]:
        """Whether the derivative of the step jumps between two points around `z`."""
        z, step, theta = stop_gradient((z, step, theta))

        def derivative(z: PyTree, direction: PyTree) -> PyTree:
            return jax.jvp(lambda z: self.prox(z, step, theta), (z,), (direction,))[1]

        def jumps(first: int) -> Bool[Array, ""]:
            direction = tree_weights(z, first)
            jump = tree_jump(
                partial(derivative, direction=direction), z, tree_scale(distance, direction)
            )
            return jump > _JUMP * tree_norm(direction)

        return jumps(0) | jumps(tree_size(z))  # one may be along the kink


class PerLeaf(AbstractProx):
    """Another term for each part of x.

    `bx.ProximalMinimum(fn, {"weights": bx.prox.L1(0.1), "bias": None})` makes one of the pytree;
    `None` stands for a part without a term.
    """

    terms: PyTree

    @property
    def has_pieces(self) -> bool:
        return all(term.has_pieces for term in self._split()[0])

    @property
    def is_penalty(self) -> bool:
        return any(term.is_penalty for term in self._split()[0])

    @property
    def is_separable(self) -> bool:
        return all(term.is_separable for term in self._split()[0])

    def _split(self) -> tuple[list[AbstractProx], Any]:
        terms, structure = jtu.tree_flatten(self.terms, is_leaf=_is_term)
        return [Box() if term is None else term for term in terms], structure

    def _parts(self, x: PyTree) -> list[tuple[AbstractProx, PyTree]]:
        terms, structure = self._split()
        try:
            return list(zip(terms, structure.flatten_up_to(x), strict=True))
        except ValueError as error:
            raise TypeError(
                "`prox` must be one of bx.prox, or a pytree of these and None like x; got "
                f"{self.terms!r} for x of structure {jtu.tree_structure(x)}."
            ) from error

    def _join(self, parts: list) -> PyTree:
        return jtu.tree_unflatten(self._split()[1], parts)

    def value(self, x: PyTree, theta: PyTree) -> Scalar:
        at = at_point(x, theta)
        values = [term.value(part, at) for term, part in self._parts(x)]
        return sum(values[1:], values[0])

    def prox(self, z: PyTree, step: Scalar, theta: PyTree) -> PyTree:
        at = at_point(z, theta)
        return self._join([term.prox(part, step, at) for term, part in self._parts(z)])

    def piece(self, z: PyTree, step: Scalar, theta: PyTree) -> Piece:
        at = at_point(z, theta)
        pieces = [term.piece(part, step, at) for term, part in self._parts(z)]

        def parts(x: PyTree) -> list[PyTree]:
            return [part for _, part in self._parts(x)]

        def smooth(x: PyTree, theta: PyTree) -> Scalar:
            at = at_point(x, theta)
            values = [p.smooth(a, at) for p, a in zip(pieces, parts(x), strict=True)]
            return sum(values[1:], values[0])

        def place(x: PyTree, theta: PyTree) -> PyTree:
            at = at_point(x, theta)
            return self._join([p.place(a, at) for p, a in zip(pieces, parts(x), strict=True)])

        def tangent(x: PyTree, g: PyTree) -> PyTree:
            leaves = zip(pieces, parts(x), parts(g), strict=True)
            return self._join([p.tangent(a, b) for p, a, b in leaves])

        return Piece(
            place,
            tangent,
            smooth,
            jnp.min(jnp.stack([p.gap for p in pieces])),
            jnp.sum(jnp.stack([p.num_free for p in pieces]), dtype=jnp.int32),
            [p.tag for p in pieces],
        )

    def is_near_kink(
        self, z: PyTree, step: Scalar, theta: PyTree, distance: Scalar
    ) -> Bool[Array, ""]:
        at = at_point(z, theta)
        near = [term.is_near_kink(part, step, at, distance) for term, part in self._parts(z)]
        return jnp.any(jnp.stack(near))


def _is_term(node: Any) -> bool:
    return node is None or isinstance(node, AbstractProx)


def as_prox(prox: Any) -> AbstractProx:
    """One term, for what the user gave."""
    if isinstance(prox, AbstractProx):
        return prox
    if isinstance(prox, tuple) and len(prox) == 2 and all(map(callable, prox)):
        return Own(*prox)
    terms = jtu.tree_leaves(prox, is_leaf=_is_term)
    if not terms or not all(map(_is_term, terms)):
        raise TypeError(
            "`prox` must be one of bx.prox, such as bx.prox.L1(0.1), a pytree of these and None "
            f"like x, or a pair of functions (value, prox); got {prox!r}."
        )
    return PerLeaf(prox)
