"""Failures of compiled programs as errors and warnings."""

import contextlib
import logging
import os
import warnings
from collections.abc import Generator
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree, Scalar

from ._results import RESULTS, SolveError
from ._tree import debugged


def fail_where(x: PyTree, failed: Bool[Array, "..."], result: RESULTS) -> PyTree:
    """`x`; a `SolveError` when the program is run and any of `failed` is true.

    JAX hands on what a callback raises in an error of its own, the message last. Like
    Equinox' errors, which need not end with the message, it is raised for a batch if one
    element has failed, and has no part in derivatives; `EQX_ON_ERROR` is respected.
    """
    if os.environ.get("EQX_ON_ERROR", "raise") != "raise":
        return eqxi.branched_error_if(x, failed, result.index, RESULTS.messages())
    arrays, rest = eqx.partition(x, eqx.is_array)
    any_failed = eqxi.unvmap_any(failed)
    code = eqxi.unvmap_max(jnp.where(failed, result.index, 0))
    return eqx.combine(_checked(arrays, any_failed, code), rest)


@eqx.filter_custom_jvp
def _checked(x: PyTree, failed: Bool[Array, ""], code: Array) -> PyTree:
    structure = jax.eval_shape(lambda: x)

    def fail() -> PyTree:
        out = jax.pure_callback(_raise, structure, code)
        # Where the runtime cannot raise (TPUs) it goes on with anything.
        nan = float("nan")
        return jtu.tree_map(lambda a: a + nan if eqx.is_inexact_array(a) else a, out)

    return jax.lax.cond(failed, fail, lambda: x)


@_checked.def_jvp
def _checked_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
    return _checked(*primals), tangents[0]


def _raise(code: np.ndarray) -> Any:
    # JAX logs what a callback raises with its whole way through JAX, and then raises it.
    logging.getLogger("jax._src.callback").addFilter(_is_news)
    raise _solve_error(int(code))


def _solve_error(code: int) -> SolveError:
    result = RESULTS(np.asarray(code, np.int32))
    return SolveError(RESULTS[result], result)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], SolveError))


@contextlib.contextmanager
def unwrapped() -> Generator[None]:
    """A `SolveError` that JAX has wrapped into an error of its own comes out as itself."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        for code, message in enumerate(RESULTS.messages()):
            if message and f"SolveError: {message}" in text:
                raise _solve_error(code) from None
        raise


def warn_above(x: PyTree[Array], seen: Scalar, most: float, message: str) -> PyTree[Array]:
    """`x`; a `UserWarning` when the program is run and `seen` is larger than `most`."""

    def say(seen: np.ndarray) -> np.ndarray:
        if np.any(seen > most):
            warnings.warn(message, UserWarning, stacklevel=2)
        return np.zeros_like(seen)

    # Pure, and so free to stand in a derivative rule; added, so that it is not left out.
    structure = jax.ShapeDtypeStruct(seen.shape, seen.dtype)
    nothing = jax.pure_callback(say, structure, seen, vmap_method="expand_dims")
    return jtu.tree_map(lambda a: a + nothing.astype(a.dtype), x)


def or_fail(x: PyTree, result: RESULTS, throw: bool) -> PyTree:
    """`x`; where `result` is a failure an error or, without `throw`, NaN."""
    failed = result != RESULTS.successful
    return error_if(x, result, failed) if throw else _poisoned(x, failed, jnp.nan)


def error_if(x: PyTree, result: RESULTS, failed: Bool[Array, ""]) -> PyTree:
    """`x`; an error where `failed`.

    Where JAX looks for numbers that are lost, a lost one is returned: JAX then runs the whole
    again outside of `jit`, and `locate` finds the user's line.
    """
    finds_nan, finds_infinity = debugged()
    if finds_nan or finds_infinity:
        is_lost = result == RESULTS.nonfinite
        x, failed = _poisoned(x, is_lost, jnp.nan if finds_nan else jnp.inf), failed & ~is_lost
    return fail_where(x, failed, result)


def _poisoned(x: PyTree, failed: Bool[Array, ""], poison: float) -> PyTree:
    # Added, so that the derivative is that of x: through a where it would be zero.
    added = jnp.where(failed, poison, 0.0)

    def add(a: Any) -> Any:
        return a + added.astype(a.dtype) if eqx.is_inexact_array(a) else a

    return jax.tree_util.tree_map(add, x)
