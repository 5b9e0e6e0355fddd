"""The quadratic game on nested pytrees; its answers come from the flat one."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._problem import Bilevel
from ._base import Oracle, Reference, numbers
from ._quadratic import game_inner, game_outer, quadratic


def nested(dtype: Any = float) -> Oracle:
    """`quadratic` with x, theta and both data as nested pytrees.

    Each of them has a `None` leaf and a string; x and theta also a tuple, a scalar and a
    matrix. The functions raise if a string does not reach them unchanged.
    """
    flat = quadratic(dtype)
    inner, outer = flat.problem.inner_data, flat.problem.outer_data

    def reference(theta: PyTree) -> Reference:
        answers = flat.reference(np.concatenate([np.ravel(leaf) for leaf in _leaves(theta)]))
        return Reference(
            x_star=_pack_x(answers.x_star),
            v_star=_without_strings(_pack_x(answers.v_star)),
            value=answers.value,
            hypergradient=_without_strings(_pack_theta(answers.hypergradient)),
        )

    return Oracle(
        name="nested",
        problem=Bilevel(
            _inner,
            _outer,
            {"model": (inner["A"], {"cross": inner["B"], "none": None}, inner["a"]), "tag": "U"},
            [{"game": outer, "none": None}, "L"],
        ),
        x0=_pack_x(flat.x0),
        theta=_pack_theta(flat.theta),
        reference=reference,
        theta_star=_pack_theta(flat.theta_star),
    )


def _pack_x(flat: Any) -> PyTree:
    return {
        "bias": flat[0],
        "name": "x",
        "none": None,
        "weights": (flat[1:3], flat[3:5].reshape(1, 2)),
    }


def _pack_theta(flat: Any) -> PyTree:
    return {"name": "theta", "pair": (flat[:2].reshape(2, 1), None), "scale": flat[2]}


def _leaves(tree: PyTree) -> list[np.ndarray]:
    return jtu.tree_leaves(numbers(tree))


def _without_strings(tree: PyTree) -> PyTree:
    # v and the hypergradient exist only where there are numbers.
    return eqx.filter(tree, lambda leaf: not isinstance(leaf, str))


def _unpack_x(x: PyTree) -> Array:
    _check(x["name"], "x")
    return jnp.concatenate([x["bias"][None], x["weights"][0], x["weights"][1].reshape(-1)])


def _unpack_theta(theta: PyTree) -> Array:
    _check(theta["name"], "theta")
    return jnp.concatenate([theta["pair"][0].reshape(-1), theta["scale"][None]])


def _inner(x: PyTree, theta: PyTree, data: PyTree) -> Scalar:
    _check(data["tag"], "U")
    a, cross, linear = data["model"]
    data = {"A": a, "B": cross["cross"], "a": linear}
    return game_inner(_unpack_x(x), _unpack_theta(theta), data)


def _outer(x: PyTree, theta: PyTree, data: PyTree) -> Scalar:
    _check(data[1], "L")
    return game_outer(_unpack_x(x), _unpack_theta(theta), data[0]["game"])


def _check(found: Any, wanted: str) -> None:
    if found != wanted:
        raise ValueError(f"A non-array leaf was changed: wanted {wanted!r}, got {found!r}.")
