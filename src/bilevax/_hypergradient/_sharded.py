"""Inside `jax.shard_map`: every device solves a problem of its own, or all solve one."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from .._problem import Bilevel, bind, start_at
from ._captured import Replaced, is_tracer

_COMMUNICATES = (
    "Inside jax.shard_map this problem communicates between devices ({}). Where each device has "
    "an x of its own, keep communication out of the inner objective, and apply it to the result: "
    "jax.lax.psum of outer(x_star(x0, theta), theta) with x_star = bx.argmin(inner). Where all "
    "solve one problem, x0 and theta must be the same on all devices (in_specs=P()): "
    "bx.hypergradient with bx.NewtonCG() or bx.LBFGS() takes its derivative, and so does "
    "bx.argmin with rule=bx.Unrolled() and bx.Descent(...)."
)
_OWN_INDEX = (
    "Inside jax.shard_map this problem asks for jax.lax.axis_index in its objectives. Ask outside, "
    "where bx.argmin or bx.hypergradient is called, and let the objectives close over the answer, "
    "or over what it selects: data = all_data[jax.lax.axis_index(...)]."
)
_CANNOT_RAISE = (
    "Inside a jax.shard_map that leaves axes of the mesh to the compiler ({}) JAX can run no "
    "callback, so that a failure cannot be raised. Pass throw=False: what failed is then NaN in "
    "bx.argmin, and named by estimate.result in bx.hypergradient. Or map over all axes of the mesh."
)
# What JAX, Lineax and Optimistix say of values whose types differ in what they vary along.
_OF_TYPES = ("varying", "{V:", "structure")


def by_device(
    fn: Callable, problem: Bilevel, x0: PyTree, theta: PyTree, *args: PyTree, throw: bool
) -> Any:
    """`fn(problem, x0, theta, *args)`, inside `jax.shard_map` on every device by itself.

    JAX keeps account of which values differ from device to device, and asks of a loop that
    its carry, and of a branch that its results, have one type in this account. In what does
    not communicate there is nothing to account for: its arrays differ, all of them, and
    `fn` sees them as on a single device. A gradient in a value that all devices share is
    summed over the devices, as it is in the rest of the user's program.

    A problem that communicates is left to JAX' account, in which x and theta that are
    equal on all devices stay so.
    """
    args = (problem, x0, theta, *args)
    if not _is_inside():
        return fn(*args)
    mesh = jax.sharding.get_abstract_mesh()
    left = sorted(set(mesh.axis_names) - set(mesh.manual_axes))
    if throw and left:
        raise TypeError(_CANNOT_RAISE.format(", ".join(left)))
    arrays: list[Any] = []
    _map_traced(arrays.append, args)
    axes = frozenset().union(*map(varying, arrays))
    if not axes:
        return fn(*args)
    apart = _map_traced(lambda a: _differing(a, axes), args)
    local = _map_traced(lambda a: _retype(a, frozenset(), _NO_MESH), apart)
    collective = _communicates(apart[:3], local[:3], frozenset(mesh.axis_names))
    if collective is not None:
        return _together(fn, args, collective)
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        out = fn(*local)
    # What came out as a constant is equal on all devices; said to differ, as the rest is.
    return jtu.tree_map(lambda a: _retype(a, axes, mesh) if eqx.is_array(a) else a, out)


def _together(fn: Callable, args: tuple, collective: str) -> Any:
    try:
        return fn(*args)
    except (TypeError, ValueError) as error:
        if not any(word in str(error) for word in _OF_TYPES):
            raise
        message = _OWN_INDEX if collective == "axis_index" else _COMMUNICATES
        raise TypeError(message.format(collective)) from error


def _communicates(apart: tuple, local: tuple, axes: frozenset) -> str | None:
    """The name of what communicates along `axes` in the functions of a problem."""
    try:
        jaxpr = _traced(*apart)
    except (TypeError, ValueError) as error:
        # JAX' account refuses a loop of the user's that is right on a single device, where
        # in its turn nothing can communicate.
        try:
            with jax.sharding.use_abstract_mesh(_NO_MESH):
                jaxpr = _traced(*local)
        except (TypeError, ValueError, AssertionError):
            raise error from None
    return _find(jaxpr, axes)


def _traced(problem: Bilevel, x0: PyTree, theta: PyTree) -> Any:
    """The functions of a problem, as JAX sees them."""
    bound, start, theta = bind(problem, x0, theta)

    def both(x: PyTree, theta: PyTree) -> tuple:
        return eqx.filter((bound.inner(x, theta), bound.outer_value(x, theta)), eqx.is_array)

    return jax.make_jaxpr(both)(start_at(start, theta), theta)


def _find(jaxpr: Any, axes: frozenset) -> str | None:
    for equation in jaxpr.eqns:
        params = equation.params
        names = params.get("axes", params.get("axis_name", ()))
        named = {names} if isinstance(names, str) else set(jtu.tree_leaves(names))
        if equation.primitive.name != "pvary" and named & axes:
            return equation.primitive.name
        for inside in jtu.tree_leaves(tuple(params.values()), is_leaf=_is_jaxpr):
            found = _find(inside, axes) if _is_jaxpr(inside) else None
            if found is not None:
                return found
    return None


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _is_inside() -> bool:
    if not hasattr(jax.lax, "pcast"):  # an older JAX: jax.shard_map(..., check_vma=False)
        return False
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _map_traced(change: Callable, tree: Any) -> Any:
    """`change` of every traced array, also of those that functions hold."""
    return Replaced(tree, is_tracer, change).tree


def varying(array: Any) -> frozenset:
    """The axes of the mesh along which `array` differs."""
    if not is_tracer(array):
        return frozenset()
    aval: Any = jax.typeof(array)
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def _differing(array: Any, axes: frozenset) -> Any:
    missing = tuple(sorted(axes - varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _retype(array: Any, axes: frozenset, mesh: Any) -> Any:
    """The same numbers; their type says that they differ along `axes`.

    Unlike `jax.lax.pcast` it sums nothing on the way back.
    """
    here = varying(array), jax.typeof(array).sharding.mesh
    return _retype_p.bind(array, there=(axes, mesh), here=here)


def _retyped(aval: Any, *, there: tuple, here: tuple) -> Any:
    del here
    axes, mesh = there
    for change in ({"axes": frozenset()}, {"mesh": mesh}, {"axes": axes}):
        if "mesh" in change:
            aval = aval.update(sharding=aval.sharding.update(mesh=mesh))
        elif hasattr(aval, "manual_axis_type"):
            kind = aval.manual_axis_type.update(varying=change["axes"])
            aval = aval.update(manual_axis_type=kind)
        else:
            aval = aval.update(vma=change["axes"])
    return aval


_NO_MESH = jax.sharding.AbstractMesh((), ())
_retype_p = Primitive("retype")
_retype_p.def_impl(lambda a, **_: a)
_retype_p.def_abstract_eval(_retyped)
mlir.register_lowering(_retype_p, lambda _, a, **__: [a])
ad.deflinear2(
    _retype_p, lambda dot, _, *, there, here: [_retype_p.bind(dot, there=here, here=there)]
)
batching.primitive_batchers[_retype_p] = lambda args, dims, **kwargs: (
    _retype_p.bind(*args, **kwargs),
    dims[0],
)
