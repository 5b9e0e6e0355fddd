"""What evolution strategies share: perturbations of theta, and the gradient in them."""

from collections.abc import Callable
from typing import NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from ..._checks import check_positive
from ..._inner._base import AbstractInnerSolver, Counts
from ..._inner._batches import check_key
from ..._problem import Bilevel
from ..._tree import is_traced, tree_norm
from .._base import AbstractHypergradient, Estimate, HypergradientState, Query, as_stats
from .._call import Call


class AbstractEvolution(AbstractHypergradient):
    """A rule that perturbs theta and looks at values of the outer objective.

    It has the gradient of one scalar, and no derivative of `x*(theta)`.
    """

    @property
    def differentiates_start(self) -> bool:
        return True

    def solution(self, query: Query, throw: bool) -> NoReturn:
        self._refuse()

    def attach_to_call(self, call: Call) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"`{type(self).__name__}` estimates the gradient of the outer objective from its "
            "values, and has no derivative of x*(theta): use it in bx.hypergradient(...) or in "
            "bx.solve(..., method=bx.DoubleLoop(...)) with an Optax optimiser."
        )


def check_settings(key: Array, num_pairs: int, batch_size: int | None) -> None:
    """Raise unless these are a random key and counts."""
    check_key(key)
    check_positive(num_pairs, "num_pairs")
    if batch_size is not None:
        check_positive(batch_size, "batch_size")


def check_inner_solver(rule: AbstractEvolution, inner_solver: AbstractInnerSolver) -> None:
    """Raise for a solver that has the solution at theta only."""
    if not inner_solver.solves_anywhere:
        raise TypeError(
            f"`{type(rule).__name__}` solves the inner problem again at perturbed theta, which "
            "bx.External and bx.Given cannot within a compiled program. Use bx.Traceable(fn), or "
            "an inner solver such as bx.Descent(optimizer, num_steps=...)."
        )


def check_rule_state(rule: AbstractEvolution, state: HypergradientState, wanted: type) -> None:
    """Raise if `state` comes from another rule."""
    fits = isinstance(state.rule, wanted)
    if not fits:
        raise ValueError(
            f"`state` does not fit: it does not come from `{type(rule).__name__}`. Give the "
            "state that the same call returned, or state=None."
        )


def as_sigma(sigma: PyTree) -> PyTree[Array]:
    """`sigma` as arrays, so that another value of it compiles nothing."""
    sigma = jtu.tree_map(jnp.asarray, sigma)
    leaves = jtu.tree_leaves(sigma)
    if not leaves or not all(jnp.issubdtype(a.dtype, jnp.floating) for a in leaves):
        raise TypeError(f"`sigma` must be a float such as 0.1, or a pytree of them; got {sigma!r}.")
    if not is_traced(leaves) and not all(bool(jnp.all(a > 0)) for a in leaves):
        raise ValueError(f"`sigma` must be positive; got {sigma!r}.")
    return sigma


def _sigma_like(theta: PyTree, sigma: PyTree) -> PyTree[Array]:
    """One `sigma` for each leaf of theta, in its dtype."""
    if isinstance(sigma, jax.Array) and sigma.ndim == 0:
        return jtu.tree_map(lambda t: sigma.astype(t.dtype), theta)
    same = jtu.tree_structure(sigma) == jtu.tree_structure(theta)
    pairs = zip(jtu.tree_leaves(sigma), jtu.tree_leaves(theta), strict=False)
    if not same or any(s.shape not in ((), t.shape) for s, t in pairs):
        raise ValueError(
            "`sigma` must be one number or a pytree like theta, each leaf a number or of the "
            f"shape of theta's; got {eqx.tree_pformat(sigma)} for theta "
            f"{eqx.tree_pformat(theta)}."
        )
    return jtu.tree_map(lambda s, t: s.astype(t.dtype), sigma, theta)


def draw(key: Array, num_pairs: int, theta: PyTree) -> PyTree[Array]:
    """Standard normal directions in the space of theta, stacked along a new first axis."""
    leaves, structure = jtu.tree_flatten(theta)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [
        jax.random.normal(k, (num_pairs, *a.shape), a.dtype)
        for k, a in zip(keys, leaves, strict=False)
    ]
    return jtu.tree_unflatten(structure, drawn)


def perturbed(theta: PyTree, sigma: PyTree, direction: PyTree) -> PyTree:
    """`theta + sigma direction`."""
    return jtu.tree_map(lambda t, s, z: t + s * z, theta, _sigma_like(theta, sigma), direction)


def over_particles(fn: Callable, particles: PyTree, batch_size: int | None) -> PyTree:
    """`fn` of each particle, all side by side or `batch_size` at a time."""
    if batch_size is None:
        return jax.vmap(fn)(particles)
    return jax.lax.map(fn, particles, batch_size=batch_size)


def gradient_and_error(
    directions: PyTree, differences: Array, sigma: PyTree
) -> tuple[PyTree, Scalar | None]:
    """The mean over pairs of `direction * difference / (2 sigma)`, and its standard error.

    The standard error is the norm over the entries of theta; one pair has none.
    """
    num_pairs = differences.shape[0]
    sigma = _sigma_like(jtu.tree_map(lambda z: z[0], directions), sigma)

    def sample(direction: PyTree, difference: Scalar) -> PyTree:
        return jtu.tree_map(lambda z, s: z * difference.astype(z.dtype) / (2 * s), direction, sigma)

    samples = jax.vmap(sample)(directions, differences)
    grad = jtu.tree_map(lambda g: jnp.mean(g, axis=0), samples)
    if num_pairs == 1:
        return grad, None
    spread = jtu.tree_map(lambda g: jnp.std(g, axis=0, ddof=1), samples)
    return grad, tree_norm(spread) / num_pairs**0.5


def evolution_estimate(
    problem: Bilevel,
    x: PyTree,
    theta: PyTree,
    grad: PyTree,
    error: Scalar | None,
    counts: Counts,
    num_steps: Array,
) -> Estimate:
    """The estimate, with value and residual at the unperturbed `x`."""
    value, aux = problem.outer_value(x, theta)
    residual = tree_norm(problem.inner.residual(x, theta))
    return Estimate.of(
        value,
        grad,
        aux=aux,
        x=x,
        inner_residual=residual,
        stats=as_stats(counts, num_steps, 0),
        error_estimate=None if error is None else error.astype(residual.dtype),
    )
