"""What runs on the host, and so cannot be transformed, says so at its door."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu

from ._reach import ARRAY, reach


def refuse_traced(name: str, instead: str, **arguments: Any) -> None:
    """Raise inside `jit`, and where an argument is traced or reaches a traced value."""
    traced = [key for key, value in arguments.items() if reaches_traced(value)]
    if traced:
        where = f"`{traced[0]}` is traced, or closes over a value that is"
    elif isinstance(jnp.zeros(()), jax.core.Tracer):  # jit traces constants, too
        where = "it was called inside a function that is being compiled"
    else:
        return
    raise TypeError(
        f"{name} runs on the host and cannot be called inside jit, vmap, grad, scan or another "
        f"transformation of JAX; here {where}. {instead}"
    )


def reaches_traced(value: Any) -> bool:
    """Whether it is traced, or closes over a value that is."""
    leaves, treedef = jtu.tree_flatten(value)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return True
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    static = [ARRAY if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
    return reach(treedef, tuple(static)).has_tracer
