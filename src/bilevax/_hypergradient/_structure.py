"""What the structure of a problem says before anything is computed: zeros and outer products.

Decided from the program that JAX makes of the user's functions, not from numbers: a
derivative that happens to be zero at some point is none of these.
"""

import warnings
from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._inner._base import AbstractInnerSolver
from .._problem import Bilevel, is_start_function, start_at
from .._problem._fixed import reaching

_BOTH = "neither the inner problem (its derivative in x) nor the outer objective depends on it"
_NUM_NAMED = 5


def warn_of_structure(
    problem: Bilevel,
    solver: AbstractInnerSolver,
    differentiates_start: bool,
    x0: PyTree,
    theta: PyTree,
) -> None:
    """Say, while tracing and so once, what cannot have been meant."""
    x = start_at(x0, theta)
    try:
        inner = jax.make_jaxpr(problem.inner.residual)(x, theta).jaxpr
        outer = jax.make_jaxpr(lambda *at: problem.outer_value(*at)[0])(x, theta).jaxpr
        start = jax.make_jaxpr(lambda theta: start_at(x0, theta))(theta).jaxpr
    except (
        TypeError,
        ValueError,
        NotImplementedError,
    ):  # the computation itself meets it next, and says it better
        return
    num_x = len(jtu.tree_leaves(x))
    by_outer = reaching(outer)
    if any(leaf.size for leaf in jtu.tree_leaves(x)) and not any(by_outer[:num_x]):
        _warn(
            "The outer objective does not depend on x: the inner problem plays no part in the "
            "hypergradient. `outer` is called with (x, theta), the inner solution first."
        )
    if not solver.may_use_theta:
        uses = [reaching(inner)[num_x:], by_outer[num_x:]]
        by_start = reaching(start) if is_start_function(x0) else [False] * len(uses[0])
        _warn_of_zeros(theta, uses, by_start, differentiates_start)
    for name, tree, begin in (("x0", x, 0), ("theta", theta, num_x)):
        for number, (path, leaf) in enumerate(jtu.tree_leaves_with_path(tree), begin):
            if leaf.ndim == 2 and leaf.shape[1] == 1 < leaf.shape[0]:
                _warn_of_outer_product(inner, number, f"{name}{jtu.keystr(path)}", leaf.shape)


def _warn_of_zeros(
    theta: PyTree, uses: list[list[bool]], by_start: list[bool], differentiates_start: bool
) -> None:
    leaves = jtu.tree_leaves_with_path(theta)
    is_used = [a or b or leaf.size == 0 for a, b, (_, leaf) in zip(*uses, leaves, strict=True)]
    names = [f"`theta{jtu.keystr(path)}`" for path, _ in leaves]
    ways = list(zip(names, is_used, by_start, strict=True))
    nowhere = [name for name, used, started in ways if not (used or started)]
    in_start = [name for name, used, started in ways if started and not used]
    if nowhere:
        hint = ""
        if len(nowhere) == len(names):
            hint = (
                " If theta is where the inner solve starts, write x0=lambda theta: ..., with a "
                "rule that differentiates the steps, such as bx.Unrolled()."
            )
        _warn(f"The hypergradient in {_some(nowhere)} is exactly zero: {_BOTH}.{hint}")
    if in_start and not differentiates_start:
        _warn(
            f"The hypergradient in {_some(in_start)} is exactly zero: it enters x0 only, which "
            "this rule holds fixed. bx.Unrolled() and bx.Truncated(...) differentiate the start."
        )


def _some(names: list[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)


def _warn_of_outer_product(jaxpr: Any, number: int, name: str, shape: tuple[int, ...]) -> None:
    """A column that meets a row which does not depend on it: n numbers become n^2."""
    row = (1, shape[0])
    depends = {id(jaxpr.invars[number])}
    for equation in jaxpr.eqns:
        operands = equation.invars
        is_of_column = [id(v) in depends for v in operands]
        if any(is_of_column):
            depends |= {id(v) for v in equation.outvars}
        shapes = [getattr(v.aval, "shape", None) for v in operands]
        if len(operands) != 2 or sorted(is_of_column) != [False, True]:
            continue
        if equation.primitive.name == "dot_general":
            continue
        column = shapes[is_of_column.index(True)]
        other = shapes[is_of_column.index(False)]
        if column == shape and other == row:
            n = shape[0]
            _warn(
                f"`{name}` of shape {shape} meets an array of shape ({n},) in `inner`, and "
                f"broadcasting makes {n} x {n} numbers of them: every variable then sees every "
                f"entry. If that is not meant, give both one shape, by `{name}.reshape(-1)`."
            )
            return
