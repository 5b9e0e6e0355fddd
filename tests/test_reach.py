"""What a function reaches besides its arguments is part of the key of a compiled program."""

import dataclasses
import functools
import gc
import types
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._hypergradient._entry import _estimate, _jitted_solution
from bilevax._jit import lean_jit
from bilevax._outer._chunk import run_chunk
from bilevax._reach._reach import reach

FIRST, SECOND = np.array([1.0, 2.0]), np.array([3.0, -1.0])
X0, THETA = jnp.zeros(2), jnp.array(0.0)


def key(*functions):
    """Two equal keys mean one program."""
    leaves, treedef = jax.tree_util.tree_flatten(functions)
    return reach(treedef, tuple(leaves)).key


def pull(x, theta, target):
    """Minimal at `x = target / (1 + e^theta)`."""
    return jnp.sum((x - jnp.asarray(target)) ** 2) + jnp.exp(theta) * jnp.sum(x**2)


class Plain:
    def __init__(self, target):
        self.target = target
        self.unused = 0

    def inner(self, x, theta):
        return pull(x, theta, self.target)

    def through_a_helper(self, x, theta):
        return self.inner(x, theta)

    def by_name(self, x, theta):
        return pull(x, theta, getattr(self, "target"))  # noqa: B009

    @property
    def aim(self):
        return self.target

    def through_a_property(self, x, theta):
        return pull(x, theta, self.aim)

    def __call__(self, x, theta):
        return pull(x, theta, self.target)


class WithSlots:
    __slots__ = ("target",)

    def __init__(self, target):
        self.target = target

    def inner(self, x, theta):
        return pull(x, theta, self.target)


@dataclasses.dataclass
class Record:
    target: object

    def inner(self, x, theta):
        return pull(x, theta, self.target)


class OfTheClass:
    target = FIRST

    def inner(self, x, theta):
        return pull(x, theta, self.target)


def set_attribute(make, method, wrap=lambda target: target):
    def case():
        thing = make(wrap(FIRST))
        return getattr(thing, method), lambda: setattr(thing, "target", wrap(SECOND))

    return case


def global_of(wrap):
    def case():
        scope = {"pull": pull, "target": wrap(FIRST)}
        exec("def inner(x, theta): return pull(x, theta, target)", scope)
        return scope["inner"], lambda: scope.update(target=wrap(SECOND))

    return case


def global_function():
    scope = {"pull": pull, "FIRST": FIRST, "SECOND": SECOND}
    exec("def target(): return FIRST", scope)
    exec("def middle(): return target()", scope)
    exec("def inner(x, theta): return pull(x, theta, middle())", scope)
    return scope["inner"], lambda: exec("def target(): return SECOND", scope)


def attribute_of_a_module():
    settings = types.ModuleType("settings")
    settings.target = FIRST
    return lambda x, theta: pull(x, theta, settings.target), lambda: setattr(
        settings, "target", SECOND
    )


def cell():
    target = FIRST

    def inner(x, theta):
        return pull(x, theta, target)

    def change():
        nonlocal target
        target = SECOND

    return inner, change


def nested():
    holder = Plain({"deep": [Record(FIRST)]})

    def inner(x, theta):
        return pull(x, theta, holder.target["deep"][0].target)

    return inner, lambda: setattr(holder.target["deep"][0], "target", SECOND)


def in_place(make):
    def case():
        target = make()

        def change():
            target[:] = SECOND

        return lambda x, theta: pull(x, theta, target), change

    return case


def argument_of_a_partial():
    target = FIRST.copy()

    def change():
        target[:] = SECOND

    return functools.partial(lambda x, theta, target: pull(x, theta, target), target=target), change


def keyword_of_a_partial():
    inner = functools.partial(lambda x, theta, target: pull(x, theta, target), target=FIRST)
    return inner, lambda: inner.keywords.update(target=SECOND)


def defaults():
    def inner(x, theta, target=FIRST):
        return pull(x, theta, target)

    return inner, lambda: setattr(inner, "__defaults__", (SECOND,))


def attribute_of_the_class():
    OfTheClass.target = FIRST
    return OfTheClass().inner, lambda: setattr(OfTheClass, "target", SECOND)


def class_overridden_in_the_object():
    OfTheClass.target = FIRST
    thing = OfTheClass()
    return thing.inner, lambda: setattr(thing, "target", SECOND)


def transformed():
    holder = Plain(FIRST)
    return jax.checkpoint(lambda x, theta: pull(x, theta, holder.target)), lambda: setattr(
        holder, "target", SECOND
    )


def custom_derivative():
    holder = Plain(FIRST)

    @jax.custom_jvp
    def inner(x, theta):
        return pull(x, theta, holder.target)

    return inner, lambda: setattr(holder, "target", SECOND)


def method_of_a_module():
    target = FIRST.copy()

    class Model(eqx.Module):
        scale: jax.Array

        def inner(self, x, theta):
            return self.scale * pull(x, theta, target)

    def change():
        target[:] = SECOND

    return Model(jnp.array(1.0)).inner, change


def call_of_a_module():
    holder = Plain(FIRST)

    class Model(eqx.Module):
        scale: jax.Array

        def __call__(self, x, theta):
            return self.scale * pull(x, theta, holder.target)

    return Model(jnp.array(1.0)), lambda: setattr(holder, "target", SECOND)


def static_field():
    holder = Plain(FIRST)

    class Model(eqx.Module):
        fn: object = eqx.field(static=True)

        def __call__(self, x, theta):
            return self.fn(x, theta)

    return Model(lambda x, theta: pull(x, theta, holder.target)), lambda: setattr(
        holder, "target", SECOND
    )


def computed_name():
    holder = Plain(FIRST)
    name = "tar" + "get"[0:]
    return lambda x, theta: pull(x, theta, getattr(holder, name)), lambda: setattr(
        holder, "target", SECOND
    )


CASES = {
    "method": set_attribute(Plain, "inner"),
    "method, jax arrays": set_attribute(Plain, "inner", jnp.asarray),
    "method, lists": set_attribute(Plain, "inner", list),
    "method, tuples": set_attribute(Plain, "inner", tuple),
    "method, numbers": set_attribute(Plain, "inner", lambda target: float(target[0])),
    "method that calls another": set_attribute(Plain, "through_a_helper"),
    "getattr": set_attribute(Plain, "by_name"),
    "property": set_attribute(Plain, "through_a_property"),
    "callable object": lambda: (
        (thing := Plain(FIRST)),
        lambda: setattr(thing, "target", SECOND),
    ),
    "slots": set_attribute(WithSlots, "inner"),
    "dataclass": set_attribute(Record, "inner"),
    "global array": global_of(jnp.asarray),
    "global NumPy array": global_of(np.copy),
    "global number": global_of(lambda target: float(target[0])),
    "global function": global_function,
    "module attribute": attribute_of_a_module,
    "cell": cell,
    "nested": nested,
    "NumPy in place": in_place(FIRST.copy),
    "strided NumPy in place": in_place(lambda: np.repeat(FIRST, 2)[::2]),
    "list in place": in_place(lambda: list(FIRST)),
    "partial": argument_of_a_partial,
    "keyword of a partial": keyword_of_a_partial,
    "defaults": defaults,
    "class attribute": attribute_of_the_class,
    "class attribute hidden": class_overridden_in_the_object,
    "checkpoint": transformed,
    "custom derivative": custom_derivative,
    "method of a module": method_of_a_module,
    "call of a module": call_of_a_module,
    "static field": static_field,
    "computed name": computed_name,
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_set_again_changes_the_key(name):
    fn, change = CASES[name]()
    before = key(fn)
    assert key(fn) == before
    change()
    assert key(fn) != before
    assert key(fn) == key(fn)


def test_what_is_changed_back_has_the_old_key():
    target = FIRST.copy()
    fn = lambda x, theta: pull(x, theta, target)
    before = key(fn)
    target[:] = SECOND
    assert key(fn) != before
    target[:] = FIRST
    assert key(fn) == before


def test_what_no_function_names_does_not_count():
    thing = Plain(FIRST)
    before = key(thing.inner)
    thing.unused = 1
    thing.new = []
    assert key(thing.inner) == before


def test_equal_functions_made_anew_have_one_key():
    target = jnp.asarray(FIRST)

    def make(number):
        return lambda x, theta: number * pull(x, theta, target)

    assert key(make(2.0)) == key(make(2.0))
    assert key(make(2.0)) != key(make(3.0)) and key(make(1)) != key(make(1.0))
    assert key(functools.partial(pull, target=2.0)) == key(functools.partial(pull, target=2.0))
    assert key(functools.partial(pull, target=2.0)) != key(functools.partial(pull, target=2.5))
    schedules = [optax.exponential_decay(0.1, 10, rate) for rate in (0.9, 0.9, 0.8)]
    first, again, other = [key(optax.sgd(schedule)) for schedule in schedules]
    assert first == again and first != other


def test_what_a_function_writes_is_not_its_data():
    log, counts = [], {"calls": 0}

    def inner(x, theta):
        log.append("traced")
        counts["calls"] += 1
        jax.debug.callback(lambda value: log.append(value), x)
        return pull(x, theta, FIRST)

    compiled = lean_jit(lambda fn, x: fn(x, 0.0))
    for _ in range(3):
        compiled(inner, X0)
        jax.effects_barrier()
    assert counts["calls"] == 1 and compiled.num_compilations() == 1 and len(log) == 4


def test_programs_are_dropped_with_what_they_reach(monkeypatch):
    monkeypatch.setattr(bx._jit, "_MAX_PROGRAMS", 2)
    monkeypatch.setattr(bx._reach._reach, "_MAX_REMEMBERED", 2)
    compiled = lean_jit(lambda fn, x: fn(x))
    gone = []

    for number in range(6):
        data = Plain(np.full(3, float(number)))
        gone.append(weakref.ref(data))
        compiled(lambda x, data=data: x + jnp.sum(data.target), 1.0)
    del data
    gc.collect()
    assert sum(ref() is not None for ref in gone) <= 3


def want(target):
    """The derivative at `theta = 0` of `sum(x^2)`, `x = target / (1 + e^theta)`."""
    return -np.sum(target**2) / 4


def outer(x, theta):
    return jnp.sum(x**2)


def test_every_view_gives_the_new_answer():
    thing = Plain(FIRST)
    solver = bx.Descent(optax.sgd(0.2), num_steps=100)
    views = {
        "hypergradient": lambda: (
            bx.hypergradient(bx.Bilevel(thing.inner, outer), X0, THETA)[0].grad
        ),
        "argmin": lambda: jax.grad(lambda t: outer(bx.argmin(thing.inner)(X0, t), t))(THETA),
        "hypergradients": lambda: bx.hypergradients(
            bx.Bilevel(thing.inner, lambda x, theta: outer(x, theta)[None]), X0, THETA
        ).grad[0],
        "unrolled": lambda: (
            bx.hypergradient(
                bx.Bilevel(thing.inner, outer), X0, THETA, inner_solver=solver, rule=bx.Unrolled()
            )[0].grad
        ),
        "start": lambda: (
            bx.hypergradient(
                bx.Bilevel(thing.inner, outer),
                lambda theta: jnp.asarray(thing.target) / (1 + jnp.exp(theta)),
                THETA,
                inner_solver=bx.Given(),
            )[0].grad
        ),
        "traceable": lambda: (
            bx.hypergradient(
                bx.Bilevel(thing.inner, outer),
                X0,
                THETA,
                inner_solver=bx.Traceable(lambda x0, theta: thing.target / (1 + jnp.exp(theta))),
            )[0].grad
        ),
        "external": lambda: (
            bx.hypergradient(
                bx.Bilevel(thing.inner, outer),
                X0,
                THETA,
                inner_solver=bx.External(lambda x0, theta: thing.target / (1 + np.exp(theta))),
            )[0].grad
        ),
    }
    for target in (FIRST, SECOND, FIRST):
        thing.target = target
        for name, view in views.items():
            np.testing.assert_allclose(view(), want(target), rtol=1e-6, err_msg=name)


def test_bodies_of_loops_and_jitted_helpers_are_traced_again():
    """JAX keeps their traces by the identity of the function."""
    scope = {"jnp": jnp, "jax": jax, "target": jnp.asarray(FIRST)}
    exec(
        "def body(c, at): return c + (at[0] - target[at[1]]) ** 2, None\n"
        "def pull(x): return jax.lax.scan(body, 0.0, (x, jnp.arange(2)))[0]\n"
        "@jax.jit\n"
        "def shrink(x, theta): return jnp.exp(theta) * jnp.sum(x**2 * target / target)\n",
        scope,
    )

    def call():  # another function in each call, over the same body
        inner = lambda x, theta: scope["pull"](x) + scope["shrink"](x, theta)
        return bx.hypergradient(bx.Bilevel(inner, outer), X0, THETA)[0].grad

    for target in (FIRST, SECOND, SECOND, FIRST):
        scope["target"] = jnp.asarray(target)
        np.testing.assert_allclose(call(), want(target), rtol=1e-6)


def test_solve_sees_the_change_and_the_second_run_compiles_nothing():
    thing = Plain(FIRST)
    problem = bx.Bilevel(thing.inner, outer)

    def run():
        return float(bx.solve(problem, X0, THETA, num_steps=2).history.value[0])

    assert run() == pytest.approx(np.sum((FIRST / 2) ** 2))
    thing.target = SECOND
    assert run() == pytest.approx(np.sum((SECOND / 2) ** 2))
    before = run_chunk.num_compilations()
    run()
    thing.target = SECOND.copy()
    run()
    assert run_chunk.num_compilations() == before


def test_new_partials_and_schedules_compile_nothing():
    data = jnp.asarray(FIRST)

    def call():
        inner = functools.partial(pull, target=2.0)
        solver = bx.Descent(optax.sgd(optax.exponential_decay(0.1, 10, 0.9)), num_steps=5)
        problem = bx.Bilevel(inner, lambda x, theta: jnp.sum((x - data) ** 2))
        bx.hypergradient(problem, X0, THETA, inner_solver=solver, rule=bx.Unrolled())
        bx.argmin(inner, solver, bx.Unrolled())(X0, THETA)

    call()
    before = _estimate.num_compilations(), _jitted_solution.num_compilations()
    call()
    assert (_estimate.num_compilations(), _jitted_solution.num_compilations()) == before


def test_data_are_copied_when_the_problem_is_made():
    data = np.ones(1 << 16)  # large enough that JAX would share its memory
    problem = bx.Bilevel(lambda x, theta, data: pull(x, theta, data[:2]), outer, inner_data=data)
    data[:] = 5.0
    np.testing.assert_allclose(bx.hypergradient(problem, X0, THETA)[0].x, 0.5, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_an_array_in_a_static_field_is_refused():
    class Model(eqx.Module):
        table: np.ndarray = eqx.field(static=True)

    structures = [jax.tree_util.tree_structure(Model(FIRST.copy())) for _ in range(2)]
    with pytest.raises(TypeError, match="declare fields that hold arrays as ordinary ones"):
        for structure in structures:
            reach(structure, ())


def test_a_black_box_may_count_without_compiling_again():
    seen = {}

    def black_box(x0, theta):
        seen["count"] = seen.get("count", 0) + 1
        return FIRST / (1 + np.exp(theta))

    x_star = bx.argmin(lambda x, theta: pull(x, theta, FIRST), bx.External(black_box))
    x_star(X0, THETA)
    before = _jitted_solution.num_compilations()
    np.testing.assert_allclose(x_star(X0, THETA + 1.0), FIRST / (1 + np.e), rtol=1e-12)
    assert _jitted_solution.num_compilations() == before and seen["count"] >= 2
