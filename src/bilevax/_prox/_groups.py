"""Penalties of groups of entries."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, Scalar

from ._base import AbstractLeafwise, LeafPiece, Settings, on_mask, setting
from ._norms import distance_to_kinks, is_kept, soft


class _Groups(eqx.Module):
    """A label for each entry of a leaf."""

    labels: Int[Array, "..."]
    num: int

    def norms(self, x: Array) -> Array:
        """Of each entry, the norm of its group; its derivative at zero is zero."""
        squares = jax.ops.segment_sum(jnp.ravel(x**2), jnp.ravel(self.labels), self.num)
        is_zero = squares == 0
        norms = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
        return norms[self.labels]

    def sum(self, entries: Array) -> Scalar:
        """The sum over groups of what is the same for all entries of a group."""
        ones = jnp.ones(self.labels.size, entries.dtype)
        sizes = jax.ops.segment_sum(ones, jnp.ravel(self.labels), self.num)
        return jnp.sum(entries / sizes[self.labels])

    def spread(self, value: Array) -> Array:
        """A number for each group, as one for each entry."""
        return value[self.labels] if value.ndim else value


class _AbstractGroups(AbstractLeafwise):
    """A penalty whose settings are a number, or one for each group."""

    is_penalty: ClassVar[bool] = True

    groups: eqx.AbstractVar[Int[Array, "..."] | None]
    num_groups: eqx.AbstractVar[int | None]

    def _of(self, x: Array) -> _Groups:
        if self.groups is not None:
            assert self.num_groups is not None
            return _Groups(self.groups, self.num_groups)
        num = x.shape[0] if x.ndim else 1
        rows = jnp.arange(num).reshape(-1, *[1] * max(x.ndim - 1, 0))
        return _Groups(jnp.broadcast_to(rows, x.shape), num)

    def _check_shapes(self, leaves: list[Array], columns: list[list[Array]]) -> None:
        name = f"bx.prox.{type(self).__name__}"
        for i, leaf in enumerate(leaves):
            if self.groups is not None and self.groups.shape != leaf.shape:
                raise ValueError(
                    f"{name}(groups=...) must have the shape of x, {leaf.shape}; got shape "
                    f"{self.groups.shape}."
                )
            num = self._of(leaf).num
            for key, column in zip(self.settings, columns, strict=True):
                if column[i].shape not in ((), (num,)):
                    raise ValueError(
                        f"{name}({key}=...) must be a number or one for each of the {num} groups; "
                        f"got shape {column[i].shape}."
                    )


def _labels(groups: Any) -> tuple[Array | None, int | None]:
    if groups is None:
        return None, None
    labels = np.asarray(groups)
    if labels.size == 0 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            "`groups` must be integers from 0 on, a label for each entry of x, or None, where each "
            f"row x[i] is a group; got {groups!r}."
        )
    return jnp.asarray(labels, jnp.int32), int(labels.max()) + 1


class GroupL2(_AbstractGroups):
    """`sum_g strength_g ||x_g||`: the group lasso.

    **Arguments:**

    - `strength`: a number, one for each group, or a function of theta that returns one. Not
        negative. Groups of different size are often given the root of their size as a factor.
    - `groups`: an integer from 0 on for each entry of x, of its shape; by default each row
        `x[i]` is a group.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.GroupL2(lambda theta: jnp.exp(theta), groups=[0, 0, 1, 1, 1])
        ```

    Reference: Yuan and Lin, "Model selection and estimation in regression with grouped
    variables", 2006.
    """

    settings: ClassVar[tuple[str, ...]] = ("strength",)

    strength: PyTree = setting(1.0)
    groups: Int[Array, "..."] | None = None
    num_groups: int | None = eqx.field(default=None, static=True)

    def __init__(self, strength: PyTree = 1.0, groups: Any = None) -> None:
        self.strength = strength
        self.groups, self.num_groups = _labels(groups)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        (strength,) = at
        groups = self._of(x)
        return groups.sum(groups.spread(strength) * groups.norms(x))

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        (strength,) = at
        groups = self._of(z)
        return _shrunk(z, groups.norms(z), step * groups.spread(strength))

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        (strength,) = at
        groups = self._of(z)
        threshold = jnp.broadcast_to(step * groups.spread(strength), z.shape)
        norms = groups.norms(z)
        is_free = is_kept(norms, threshold)

        def smooth(x: Array, strength: Array) -> Scalar:
            x = jnp.where(is_free, x, 0)
            return groups.sum(jnp.where(is_free, groups.spread(strength) * groups.norms(x), 0))

        gap = distance_to_kinks(norms, threshold)
        return on_mask(is_free, lambda strength: jnp.zeros((), z.dtype), smooth, gap, is_free)


class SparseGroup(_AbstractGroups):
    """`l1 ||x||_1 + sum_g l2_g ||x_g||`: the sparse group lasso.

    **Arguments:** `l1`, `l2`, `groups`: as in `GroupL2`; `l1` of a group is that of its entries.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        penalty = bx.prox.SparseGroup(
            lambda t: jnp.exp(t[0]), lambda t: jnp.exp(t[1]), groups=[0, 0, 1, 1, 1]
        )
        ```

    Reference: Simon, Friedman, Hastie and Tibshirani, "A sparse-group lasso", 2013.
    """

    settings: ClassVar[tuple[str, ...]] = ("l1", "l2")

    l1: PyTree = setting(1.0)
    l2: PyTree = setting(1.0)
    groups: Int[Array, "..."] | None = None
    num_groups: int | None = eqx.field(default=None, static=True)

    def __init__(self, l1: PyTree = 1.0, l2: PyTree = 1.0, groups: Any = None) -> None:
        self.l1 = l1
        self.l2 = l2
        self.groups, self.num_groups = _labels(groups)

    def of_leaf(self, x: Array, at: Settings) -> Scalar:
        l1, l2 = at
        groups = self._of(x)
        entries = jnp.sum(groups.spread(l1) * jnp.abs(x))
        return entries + groups.sum(groups.spread(l2) * groups.norms(x))

    def step_of_leaf(self, z: Array, step: Scalar, at: Settings) -> Array:
        l1, l2 = at
        groups = self._of(z)
        entries = soft(z, step * groups.spread(l1))
        return _shrunk(entries, groups.norms(entries), step * groups.spread(l2))

    def piece_of_leaf(self, z: Array, step: Scalar, at: Settings) -> LeafPiece:
        l1, l2 = at
        groups, signs = self._of(z), jnp.sign(z)
        first = jnp.broadcast_to(step * groups.spread(l1), z.shape)
        second = jnp.broadcast_to(step * groups.spread(l2), z.shape)
        norms = groups.norms(soft(z, first))
        is_active = is_kept(norms, second)
        is_free = is_active & is_kept(z, first)

        def smooth(x: Array, l1: Array, l2: Array) -> Scalar:
            x = jnp.where(is_free, x, 0)
            norms = jnp.where(is_active, groups.spread(l2) * groups.norms(x), 0)
            return jnp.sum(groups.spread(l1) * signs * x) + groups.sum(norms)

        # An entry's own kink counts in a group that is there.
        of_entry = jnp.where(is_active, distance_to_kinks(z, first), jnp.inf)
        gap = jnp.minimum(of_entry, distance_to_kinks(norms, second))
        side = jnp.where(is_free & (first > 0), signs, 0)
        return on_mask(is_free, lambda l1, l2: jnp.zeros((), z.dtype), smooth, gap, side)


def _shrunk(z: Array, norms: Array, threshold: Array) -> Array:
    """`z` with its groups shortened by `threshold`, at most to zero."""
    is_zero = norms <= threshold
    kept = 1 - threshold / jnp.where(is_zero, 1, norms)
    return jnp.where(is_zero & (threshold > 0), 0, jnp.where(is_zero, 1, kept) * z)
