"""Compilation of functions whose arguments are more than arrays."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree

from ._reach._firsts import tracing_context
from ._reach._reach import ARRAY, reach
from ._tree import debugged


def lean_jit(fn: Callable, *, donate_first: bool = False, lift: Callable | None = None) -> Callable:
    """`jax.jit` for pytrees with non-array leaves.

    Arrays are traced. Everything else is compiled in, with what its functions reach (see
    `reach`), and compared: a function by its code, a number by its value, another object by
    its own equality. Costs a fraction of the call overhead of `equinox.filter_jit`, which
    matters where a whole hypergradient takes a millisecond. With `donate_first` the arrays
    of the first argument may be overwritten. Where functions close over traced values,
    `lift` returns the arguments with these as arrays.
    """
    programs: OrderedDict[Any, _Program] = OrderedDict()

    def call(*args: Any, is_lifted: bool = lift is None) -> Any:
        leaves, treedef = jtu.tree_flatten(args)
        is_array = [eqx.is_array(leaf) for leaf in leaves]
        static = [ARRAY if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        arrays = [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]
        reached = reach(treedef, tuple(static))
        if reached.has_tracer and not is_lifted:
            assert lift is not None
            return call(*lift(*args), is_lifted=True)
        debug = debugged()
        key = reached.key, debug
        program = programs.get(key)
        if program is None:
            # Where it finds a NaN, JAX runs again with the arguments, which must be there.
            donate = donate_first and not any(debug)
            program = _Program(fn, treedef, static, donate, reached.state)
            if not reached.has_tracer:  # what reaches a traced value lives in this call only
                programs[key] = program
                if len(programs) > _MAX_PROGRAMS:
                    programs.pop(next(iter(programs)), None)
        program.reached = reached
        num_donated = 0
        if donate_first:
            num_donated = sum(eqx.is_array(leaf) for leaf in jtu.tree_leaves(args[0]))
        with tracing_context(program.state) if program.state else nullcontext():
            arrays_out, rest = program.compiled(arrays[:num_donated], arrays[num_donated:])
        return rest.filled(arrays_out)

    def num_compilations() -> int:
        sizes = [p.compiled._cache_size() for p in programs.values()]  # type: ignore[attr-defined]
        return sum(sizes)

    call.num_compilations = num_compilations  # type: ignore[attr-defined]
    return call


# Each maps memory and keeps alive what it was compiled with: the oldest makes room.
_MAX_PROGRAMS = 512


class _Program:
    """One function with everything that is not an array put in, compiled."""

    reached: Any

    def __init__(
        self, fn: Callable, treedef: Any, static: list[Any], donate: bool, state: int
    ) -> None:
        def flat_fn(donated: list[Array], kept: list[Array]) -> Any:
            arrays = iter([*donated, *kept])
            leaves = [next(arrays) if leaf is ARRAY else leaf for leaf in static]
            out, structure = jtu.tree_flatten(fn(*jtu.tree_unflatten(treedef, leaves)))
            self.reached.forget_changes()
            rest = tuple(ARRAY if eqx.is_array(leaf) else leaf for leaf in out)
            return [leaf for leaf in out if eqx.is_array(leaf)], _Static(structure, rest)

        self.state = state
        self.compiled = jax.jit(flat_fn, donate_argnums=0 if donate else ())


@jtu.register_static
class _Static:
    """Carries what is not an array out of a jitted function."""

    def __init__(self, structure: Any, leaves: tuple) -> None:
        self._key = structure, leaves

    def filled(self, arrays: list[Array]) -> PyTree:
        """With the arrays put back."""
        structure, leaves = self._key
        rest = iter(arrays)
        return structure.unflatten([next(rest) if leaf is ARRAY else leaf for leaf in leaves])

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


@jtu.register_static
class Opaque:
    """A static node of a carry that is the same object before and after every step."""

    def __init__(self, value: PyTree) -> None:
        self.value = value


def optimizer_as_pytree(optimizer: optax.GradientTransformation) -> Any:
    """An Optax optimiser (a tuple of closures) as a pytree, its numbers as arrays.

    Then a new optimiser of the same kind, with another learning rate, compiles nothing.
    The arrays are weakly typed, as the Python numbers were, so that they do not promote
    float32 parameters. To be called under `standard_promotion`. An optimiser that cannot
    do with arrays (a schedule that closes over itself, a line search that hashes its
    settings) stays as it is.
    """

    def first_update(optimizer: Any, x: Array) -> PyTree:
        update = optax.with_extra_args_support(optimizer).update
        value = jnp.sum(x)
        return update(x, optimizer.init(x), x, value=value, grad=x, value_fn=jnp.sum)

    try:
        as_pytree = eqxi.closure_to_pytree(optimizer)
        as_pytree = jtu.tree_map(_optimizer_leaf, as_pytree)
        with standard_promotion():
            eqx.filter_eval_shape(first_update, as_pytree, jnp.ones(2))
    except (TypeError, ValueError):  # tracing errors of JAX are among these
        return optimizer
    return as_pytree


def _optimizer_leaf(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return jnp.asarray(leaf)
    return _SameSource(leaf) if hasattr(leaf, "information") else leaf


class _SameSource:
    """A function that equals others of the same source code.

    Equinox' own leaf reads the file again for every comparison, several milliseconds a
    call of a compiled function.
    """

    def __init__(self, leaf: Any) -> None:
        self.fn = leaf.fn
        self._source = leaf.information()

    def __hash__(self) -> int:
        return hash(self._source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameSource) and self._source == other._source


def standard_promotion() -> Any:
    """For calls of Optax, which mixes its numbers, here arrays, with integer counts."""
    return jax.numpy_dtype_promotion("standard")
