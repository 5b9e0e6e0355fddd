"""Functions evaluated with some of their primitives replaced."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Literal, Primitive, primitives
from jaxtyping import Array, PyTree

# What stands in for a primitive: `run, params, operands -> results`, or `None` to keep it.
# `run(jaxpr, *operands)` evaluates a part of the primitive, rewritten itself.
Rule = Callable[..., list | None]


def rewrite(fn: Callable, rules: Mapping[str, Rule], *example: PyTree) -> Callable:
    """`fn` with the primitives named in `rules` replaced; `fn` itself if it has none of them.

    The values of `fn` do not change, only how it is differentiated: what has a derivative
    rule of its own (`custom_jvp`, `custom_vjp`, `custom_linear_solve`) keeps it.
    """
    return _rewritten(fn, rules) if _has(jax.make_jaxpr(fn)(*example), rules) else fn


def _rewritten(fn: Callable, rules: Mapping[str, Rule]) -> Callable:
    def rewritten(*args: PyTree) -> PyTree:
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        results = _run(rules, jaxpr, *jtu.tree_leaves(args))
        return jtu.tree_unflatten(jtu.tree_structure(out), results)

    return rewritten


def _run(rules: Mapping[str, Rule], closed: ClosedJaxpr, *args: Any) -> list:
    """The results of a program, equation by equation."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return literal(atom) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        with equation.ctx.manager:
            results = _replace(rules, equation, operands)
            if results is None:
                results = as_it_is(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def literal(atom: Literal) -> Any:
    """Its value, an array; in older JAX it may be a Python number."""
    value, kind = atom.val, cast(Any, atom.aval)
    return value if hasattr(value, "dtype") else jnp.asarray(value, kind.dtype)


def as_it_is(equation: Any, operands: list) -> list:
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    if isinstance(params, tuple):  # until JAX 0.9: the functions apart
        operands, params = [*params[0], *operands], params[1]
    results = primitive.bind(*operands, **params)
    return results if primitive.multiple_results else [results]


def _replace(rules: Mapping[str, Rule], equation: Any, operands: list) -> list | None:
    """The results of an equation that is replaced, or has a part that is; else `None`."""
    name, params = equation.primitive.name, equation.params
    run = functools.partial(_run, rules)
    if name in rules and (results := rules[name](run, params, operands)) is not None:
        return results
    rule = _STRUCTURES.get(name)
    if rule is None or not any(_has(part, rules) for part in _parts(params)):
        return None
    return rule(run, params, operands)


def _has(closed: ClosedJaxpr, rules: Mapping[str, Rule]) -> bool:
    for equation in closed.jaxpr.eqns:
        name = equation.primitive.name
        if name in rules:
            return True
        if name in _STRUCTURES and any(_has(part, rules) for part in _parts(equation.params)):
            return True
    return False


def _parts(params: dict) -> Iterator[ClosedJaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple) else (value,):
            if hasattr(part, "eqns"):
                yield _closed(part)


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def called(params: dict) -> ClosedJaxpr:
    """The program that one of `CALLS` runs."""
    return _closed(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def _call(run: Callable, params: dict, operands: list) -> list:
    return run(called(params), *operands)


def _cond(run: Callable, params: dict, operands: list) -> list:
    branches = [functools.partial(run, branch) for branch in params["branches"]]
    return jax.lax.switch(operands[0], branches, *operands[1:])


def _scan(run: Callable, params: dict, operands: list) -> list:
    num_consts, num_carry = _scan_sizes(params)
    consts, rest = operands[:num_consts], operands[num_consts:]

    def body(carry: list, x: list) -> tuple[list, list]:
        results = run(_closed(params["jaxpr"]), *consts, *carry, *x)
        return results[:num_carry], results[num_carry:]

    carry, ys = jax.lax.scan(
        body,
        rest[:num_carry],
        rest[num_carry:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _scan_sizes(params: dict) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since JAX 0.12: a tree of each kind
    return len(consts), len(carry)


def _while(run: Callable, params: dict, operands: list) -> list:
    keep_going, body, start = while_parts(run, params, operands)
    return jax.lax.while_loop(keep_going, body, start)


def while_parts(run: Callable, params: dict, operands: list) -> tuple[Callable, Callable, list]:
    """The condition, the body and the start of a `while` primitive."""
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = operands[: split[0]], operands[split[0] : split[1]]

    def keep_going(carry: list) -> Array:
        return run(params["cond_jaxpr"], *cond_consts, *carry)[0]

    def body(carry: list) -> list:
        return run(params["body_jaxpr"], *body_consts, *carry)

    return keep_going, body, operands[split[1] :]


def _remat(run: Callable, params: dict, operands: list) -> list:
    options = {name: params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(lambda *args: _call(run, params, list(args)), **options)(*operands)


# Primitives that run one program, their operands its arguments
CALLS = ("jit", "pjit", "closed_call", "core_call", "core_closed_call")
# Those that are made of programs, and have no derivative rule of their own
_STRUCTURES: dict[str, Rule] = {
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "checkpoint": _remat,
    "remat": _remat,
}


def without_zero_over_zero(fn: Callable, *example: PyTree) -> Callable:
    """`fn`, its derivative free of the NaN that `0 * inf` makes of a harmless division.

    Optimisers guard divisions and roots with `where`, which keeps their values finite but
    not their derivatives. A root has here the derivative zero at zero (so `sqrt(g^2)` that
    of `|g|`), and so has a division where its denominator is zero. The values there are zero
    or not finite, so nothing that was finite is changed but a root that is not multiplied
    by zero (a norm), whose subgradient is zero, too.
    """
    if not _has(jax.make_jaxpr(fn)(*example), _GUARDS):
        return fn
    return _rewritten(fn, {**_GUARDS, **_GUARDS_OF_PRODUCTS})


def _guard(primitive: Primitive, at_zero: bool) -> Rule:
    """The rule for a primitive that is singular where its last operand is zero, or nowhere.

    No derivative there, nor where the value is not finite (the root of a negative number,
    and what a line search computes from it before it discards it).
    """

    def rule(run: Callable, params: dict, operands: list) -> list | None:
        del run
        if params.get("y", -1) >= 0 or not jnp.issubdtype(operands[-1].dtype, jnp.floating):
            return None  # a power without singularity, or a quotient of integers

        @jax.custom_jvp
        def guarded(*operands: Array) -> Array:
            return primitive.bind(*operands, **params)

        @guarded.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
            value = guarded(*primals)
            is_singular = ~jnp.isfinite(value)
            if at_zero:
                is_singular |= primals[-1] == 0
            safe = tuple(jnp.where(is_singular, 1, x) for x in primals)
            along = tuple(jnp.broadcast_to(x, value.shape) for x in tangents)
            _, slope = jax.jvp(lambda *x: primitive.bind(*x, **params), safe, along)
            return value, jnp.where(is_singular, 0, slope)

        return [guarded(*operands)]

    return rule


_GUARDS: dict[str, Rule] = {
    "div": _guard(primitives.div_p, at_zero=True),
    "sqrt": _guard(primitives.sqrt_p, at_zero=True),
    "rsqrt": _guard(primitives.rsqrt_p, at_zero=True),
    "integer_pow": _guard(primitives.integer_pow_p, at_zero=True),
}
# Not singular, but with a factor that is not finite, `0 * inf` in the derivative
_GUARDS_OF_PRODUCTS: dict[str, Rule] = {"mul": _guard(primitives.mul_p, at_zero=False)}
