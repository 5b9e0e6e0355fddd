"""Terms that are not smooth: a value, a proximal step, and the smooth piece on which x lies."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._as_written import OneLine
from .._reach._traced import reaches_traced
from .._tree import stop_gradient

# What a leaf's strengths, bounds and weights are at theta.
Settings = tuple[Array, ...]


class AbstractProx(OneLine, eqx.Module):
    """A convex term `R(x, theta)` with its proximal step.

    Law: `prox(z, step, theta)` minimises `R(x, theta) + ||x - z||^2 / (2 step)` over x.

    One that `has_pieces` says on which smooth piece a proximal step ends: there x is `place(x)`,
    whatever the other entries of x are, moves along `tangent`, and R is `smooth`.
    """

    has_pieces: ClassVar[bool] = True
    # Whether it is a penalty of entries, of which none may be left, and not a set.
    is_penalty: ClassVar[bool] = False
    # Whether what it holds of one array is held at zero, entry by entry, and may be almost all.
    leaves_few: ClassVar[bool] = False
    # Whether it is a sum of terms of one entry each.
    is_separable: ClassVar[bool] = False

    @abc.abstractmethod
    def value(self, x: PyTree, theta: PyTree) -> Scalar:
        """`R(x, theta)` on its domain."""

    @abc.abstractmethod
    def prox(self, z: PyTree, step: Scalar, theta: PyTree) -> PyTree:
        """The proximal step from `z`."""

    def piece(self, z: PyTree, step: Scalar, theta: PyTree) -> "Piece":
        """The piece on which the step from `z` ends; only of one that `has_pieces`."""
        raise NotImplementedError

    def of_entries(self, x: Array, theta: PyTree, index: Array) -> "AbstractProx":
        """The term of some entries of x, its settings those at theta; of one that `leaves_few`."""
        raise NotImplementedError

    def is_near_kink(
        self, z: PyTree, step: Scalar, theta: PyTree, distance: Scalar
    ) -> Bool[Array, ""]:
        """Whether the step from `z` has a kink so near."""
        return self.piece(z, step, theta).gap <= distance

    def map_functions(self, wrap: Callable[[Callable], Callable]) -> "AbstractProx":
        """The same with other functions of theta: `wrap` of each."""

        def mapped(node: Any) -> Any:
            if isinstance(node, Apart) and reaches_traced(node.fn):
                raise TypeError(
                    "A function of bx.prox.Own closes over a traced value, whose influence would "
                    "be lost: hand it over in theta."
                )
            return OfTheta(wrap(node.fn)) if isinstance(node, OfTheta) else node

        return jtu.tree_map(mapped, self, is_leaf=lambda n: isinstance(n, OfTheta | Apart))


class Piece(NamedTuple):
    """A smooth piece of `R`, with `theta` free again."""

    place: Callable[[PyTree, PyTree], PyTree]  # (x, theta) -> the x of the piece nearest to it
    tangent: Callable[[PyTree, PyTree], PyTree]  # (x, gradient) -> its part along the piece
    smooth: Callable[[PyTree, PyTree], Scalar]  # (x, theta) -> R
    gap: Scalar  # how far z is from another piece
    num_free: Array  # entries of x that are not held
    tag: PyTree  # arrays of booleans and signs that are equal for equal pieces


class At(NamedTuple):
    """Where settings are evaluated, for terms of parts of x: the whole x, theta, and the data."""

    x: PyTree
    theta: PyTree
    data: tuple[PyTree, ...]


def at_point(x: PyTree, theta: PyTree) -> At:
    """`theta`, with what functions of it are called with beside."""
    return theta if isinstance(theta, At) else At(x, theta, ())


class OfTheta(eqx.Module):
    """A setting that is a function of theta, called like the objective."""

    stands_for: ClassVar[str] = "fn"

    fn: Callable

    def __call__(self, at: At) -> Any:
        return self.fn(at.x, at.theta, *at.data)


class Apart(eqx.Module):
    """A function that is not called like the objective: it may close over no traced value."""

    stands_for: ClassVar[str] = "fn"

    fn: Callable


class _WithoutX(eqx.Module):
    stands_for: ClassVar[str] = "fn"

    fn: Callable

    def __call__(self, x: PyTree, theta: PyTree, *data: PyTree) -> Any:
        del x, data
        return self.fn(theta)


def as_setting(value: Any) -> Any:
    """A strength, a bound, a weight: a number, an array, or a function of theta."""
    if isinstance(value, OfTheta) or value is None:
        return value
    if callable(value):
        return OfTheta(_WithoutX(value))
    return jtu.tree_map(lambda a: jnp.asarray(a) if isinstance(a, (int, float)) else a, value)


def setting(default: float) -> Any:
    """A field for one."""
    return eqx.field(default=default, converter=as_setting)


class AbstractLeafwise(AbstractProx):
    """A term of each leaf of x by itself.

    Settings are one for all leaves, or pytrees like x. Subclasses treat one leaf: the settings
    come in the order of `settings`.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        """`R` of a leaf."""

    @abc.abstractmethod
    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        """The proximal step of a leaf."""

    @abc.abstractmethod
    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> "LeafPiece":
        """The piece of a leaf."""

    def value(self, x: PyTree, theta: PyTree) -> Scalar:
        values = [self.of_leaf(a, at) for a, at in self._each(x, theta)]
        return sum(values[1:], values[0])

    def prox(self, z: PyTree, step: Scalar, theta: PyTree) -> PyTree:
        leaves = [self.step_of_leaf(a, step, at) for a, at in self._each(z, theta)]
        return jtu.tree_unflatten(jtu.tree_structure(z), leaves)

    def piece(self, z: PyTree, step: Scalar, theta: PyTree) -> Piece:
        z, step, theta = stop_gradient((z, step, theta))
        pieces = [self.piece_of_leaf(a, step, at) for a, at in self._each(z, theta)]
        structure = jtu.tree_structure(z)

        def place(x: PyTree, theta: PyTree) -> PyTree:
            leaves = zip(pieces, self._each(x, theta), strict=True)
            placed = [p.place(a, *at) for p, (a, at) in leaves]
            return jtu.tree_unflatten(structure, placed)

        def tangent(x: PyTree, gradient: PyTree) -> PyTree:
            leaves = zip(pieces, jtu.tree_leaves(x), jtu.tree_leaves(gradient), strict=True)
            return jtu.tree_unflatten(structure, [p.tangent(a, g) for p, a, g in leaves])

        def smooth(x: PyTree, theta: PyTree) -> Scalar:
            leaves = zip(pieces, self._each(x, theta), strict=True)
            values = [p.smooth(a, *at) for p, (a, at) in leaves]
            return sum(values[1:], values[0])

        gap = jnp.min(jnp.stack([p.gap for p in pieces]))
        num_free = jnp.sum(jnp.stack([p.num_free for p in pieces]), dtype=jnp.int32)
        return Piece(place, tangent, smooth, gap, num_free, [p.tag for p in pieces])

    def _each(self, x: PyTree, theta: PyTree) -> list[tuple[Array, Settings]]:
        return list(zip(jtu.tree_leaves(x), self._settings(x, theta), strict=True))

    def _settings(self, x: PyTree, theta: PyTree) -> list[Settings]:
        """For every leaf of x the settings at theta, in its dtype."""
        leaves, structure = jtu.tree_flatten(x)
        columns = []
        for name in self.settings:
            value = getattr(self, name)
            value = value(at_point(x, theta)) if isinstance(value, OfTheta) else value
            parts = [value] * len(leaves)
            if not eqx.is_array_like(value):
                if jtu.tree_structure(value) != structure:
                    raise TypeError(
                        f"bx.prox.{type(self).__name__}({name}=...) must be a number, an array, a "
                        "function of theta, or a pytree of these like x; got "
                        f"{type(value).__name__} for x of structure {structure}."
                    )
                parts = jtu.tree_leaves(value)
            columns.append([jnp.asarray(v, a.dtype) for v, a in zip(parts, leaves, strict=True)])
        self._check_shapes(leaves, columns)
        return list(zip(*columns, strict=True)) if columns else [()] * len(leaves)

    def of_entries(self, x: Array, theta: PyTree, index: Array) -> "AbstractLeafwise":
        ((_, settings),) = self._each(x, theta)
        chosen = [a[index] if a.shape else a for a in settings]
        return dataclasses.replace(self, **dict(zip(self.settings, chosen, strict=True)))

    def _check_shapes(self, leaves: list[Array], columns: list[list[Array]]) -> None:
        for name, column in zip(self.settings, columns, strict=True):
            for value, leaf in zip(column, leaves, strict=True):
                if value.shape and value.shape != leaf.shape:
                    raise ValueError(
                        f"bx.prox.{type(self).__name__}({name}=...) must be a number or of the "
                        f"shape of x, {leaf.shape}; got shape {value.shape}."
                    )


class LeafPiece(NamedTuple):
    """As `Piece`, of one leaf, its settings as arguments."""

    place: Callable[..., Array]
    tangent: Callable[[Array, Array], Array]
    smooth: Callable[..., Scalar]
    gap: Scalar
    num_free: Array
    tag: PyTree


def on_mask(
    is_free: Bool[Array, "..."],
    held_at: Callable[..., Any],
    smooth: Callable[..., Scalar],
    gap: Array,
    side: Array,
) -> LeafPiece:
    """The piece on which some entries are free, and the others held at `held_at(*settings)`.

    `side`: on which side of its kink every entry is, free or held.
    """
    return LeafPiece(
        place=lambda x, *at: jnp.where(is_free, x, held_at(*at)),
        tangent=lambda x, g: jnp.where(is_free, g, 0),
        smooth=smooth,
        gap=jnp.min(gap, initial=jnp.inf),
        num_free=jnp.sum(is_free, dtype=jnp.int32),
        tag=(is_free, side),
    )


def no_value(x: Array, *settings: Array) -> Scalar:
    """Of a set: nothing, on it."""
    del settings
    return jnp.zeros((), x.dtype)
