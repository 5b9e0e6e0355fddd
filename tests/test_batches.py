"""Minibatches inside the steps, against a Python loop over the same batches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.testing import relative_error

NUM_EXAMPLES, SIZE, NUM_STEPS = 11, 3, 9
KEY = jax.random.key(3)


def inner(x, theta, data):
    errors = jnp.tanh(data["features"] @ x) - data["targets"]
    weights = jax.nn.sigmoid(theta["weights"][data["index"]])
    return jnp.mean(weights * errors**2) + jnp.exp(theta["decay"]) * jnp.sum(x**2)


def outer(x, theta, data):
    return jnp.sum((x - data) ** 2) + theta["decay"] ** 2


def make_problem(dtype=float, num_examples=NUM_EXAMPLES):
    features = jax.random.normal(jax.random.key(0), (num_examples, 4)).astype(dtype)
    data = {
        "features": features,
        "targets": jnp.sin(jnp.arange(num_examples, dtype=dtype)),
        "index": jnp.arange(num_examples),
        "name": "not an array",
    }
    theta = {
        "weights": jnp.cos(jnp.arange(num_examples, dtype=dtype)),
        "decay": jnp.asarray(-2.0, dtype),
    }
    return bx.Bilevel(inner, outer, data, jnp.arange(4, dtype=dtype)), jnp.ones(4, dtype), theta


MINIBATCHES = bx.Minibatches(SIZE, key=KEY)
TABLE = np.random.default_rng(0).permutation(10).reshape(5, 2)


def middle(step, data):
    """A user's own stream: three examples in a row, beginning one later at each step."""
    begin = step % (NUM_EXAMPLES - 2)

    def take(a):
        return jax.lax.dynamic_slice_in_dim(a, begin, 3) if hasattr(a, "shape") else a

    return jax.tree.map(take, data)


STREAMS = {
    "Minibatches": (MINIBATCHES, lambda k: MINIBATCHES.indices(k, NUM_EXAMPLES)),
    "table": (TABLE, lambda k: TABLE[k % 5]),
    "function": (middle, lambda k: np.arange(3) + k % (NUM_EXAMPLES - 2)),
}
OPTIMISERS = {"sgd": optax.sgd(0.2), "adam": optax.adam(0.05, eps_root=1e-12)}


def python_loop(problem, x, theta, rows, optimiser, num_detached=0):
    """L after the steps over `rows` of indices, as anybody would write it."""

    @jax.jit  # compiled for one step, and not for all
    def step(x, state, theta, row):
        batch = {n: a[row] for n, a in problem.inner_data.items() if n != "name"}
        grad = jax.grad(inner)(x, theta, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grad, state, x)
        return optax.apply_updates(x, updates), state

    state = optimiser.init(x)
    for k, row in enumerate(rows):
        if k == num_detached > 0:
            x, state = jax.lax.stop_gradient((x, state))
        x, state = step(x, state, theta, row)
    return outer(x, theta, problem.outer_data), x


@pytest.mark.parametrize(
    ("stream", "optimiser"),
    [("Minibatches", "sgd"), ("table", "sgd"), ("function", "sgd"), ("Minibatches", "adam")],
)
def test_a_python_loop_over_the_same_batches_agrees(stream, optimiser):
    problem, x0, theta = make_problem()
    batches, indices = STREAMS[stream]
    solver = bx.Descent(OPTIMISERS[optimiser], NUM_STEPS, batches=batches)
    rows = [np.asarray(indices(k)) for k in range(NUM_STEPS)]
    detached = {bx.Truncated(4): NUM_STEPS - 4}
    policies = [bx.Unrolled(checkpoints=c) for c in ("sqrt", "all", 2)]
    # Every policy on one of the streams, with a state that is more than x.
    by_adam = (*policies, bx.Truncated(4))
    by_sgd = (policies[0], bx.Truncated(4)) if stream == "Minibatches" else policies[:1]

    @functools.cache
    def reference(num_detached):
        return jax.value_and_grad(python_loop, argnums=2, has_aux=True)(
            problem, x0, theta, rows, OPTIMISERS[optimiser], num_detached
        )

    for rule in by_adam if optimiser == "adam" else by_sgd:
        estimate, _ = bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=rule)
        (_, x), expected = reference(detached.get(rule, 0))
        assert relative_error(estimate.x, x) < 1e-12
        assert relative_error(estimate.grad, expected) < 1e-12
        full = jax.grad(inner)(x, theta, problem.inner_data)
        assert relative_error(estimate.inner_residual, jnp.linalg.norm(full)) < 1e-12


def test_steps_under_jit_vmap_and_in_float32():
    problem, x0, theta = make_problem()
    keys = jax.random.split(jax.random.key(7), 3)

    def grad(key, problem, x0, theta):
        solver = bx.Descent(optax.sgd(0.2), NUM_STEPS, batches=bx.Minibatches(SIZE, key=key))
        rule = bx.Unrolled()
        return bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=rule)[0].grad

    several = jax.jit(jax.vmap(lambda key: grad(key, problem, x0, theta)))(keys)
    for i, key in enumerate(keys):
        one = grad(key, problem, x0, theta)
        assert relative_error(jax.tree.map(lambda a: a[i], several), one) < 1e-12
    assert relative_error(one, grad(keys[0], problem, x0, theta)) > 1e-2  # the key matters
    single = grad(keys[2], *make_problem(jnp.float32))
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(single))
    assert relative_error(single, one) < 1e-4


def test_implicit_rules_see_all_data():
    problem, x0, theta = make_problem()
    noisy = bx.Descent(optax.sgd(0.2), 50, batches=MINIBATCHES)
    estimate, _ = bx.hypergradient(
        problem, x0, theta, inner_solver=noisy, rule=bx.Implicit(), throw=False
    )
    assert estimate.result == bx.RESULTS.inner_not_converged  # flagged: one step size is left
    estimate, _ = bx.hypergradient(
        problem, x0, theta, inner_solver=noisy, rule=bx.Implicit(inexact=True)
    )
    there, _ = bx.hypergradient(
        problem, estimate.x, theta, inner_solver=bx.Given(), rule=bx.Implicit(inexact=True)
    )
    assert relative_error(estimate.grad, there.grad) < 1e-8
    decaying = optax.sgd(optax.polynomial_schedule(0.2, 1e-4, 1, 3_000))
    solver = bx.Descent(decaying, 3_000, batches=MINIBATCHES)
    estimate, _ = bx.hypergradient(
        problem, x0, theta, inner_solver=solver, rule=bx.Implicit(inexact=True)
    )
    exact, _ = bx.hypergradient(problem, x0, theta)
    assert relative_error(estimate.grad, exact.grad) < 1e-2


def test_the_stream_goes_on_from_one_outer_step_to_the_next():
    problem, x0, theta = make_problem()
    indices = STREAMS["Minibatches"][1]
    rows = [np.asarray(indices(k)) for k in range(2 * NUM_STEPS)]
    for restart in (False, True):
        solver = bx.Descent(
            optax.sgd(0.2, momentum=0.9), NUM_STEPS, batches=MINIBATCHES, restart_batches=restart
        )
        settings = {"inner_solver": solver, "rule": bx.Unrolled()}
        first, state = bx.hypergradient(problem, x0, theta, **settings)
        second, _ = bx.hypergradient(problem, x0, theta, **settings, state=state)
        seen = rows[:NUM_STEPS] if restart else rows[NUM_STEPS:]
        # the moments begin anew: they belong to another theta
        fresh = optax.sgd(0.2, momentum=0.9)
        (_, x), expected = jax.value_and_grad(python_loop, argnums=2, has_aux=True)(
            problem, first.x, theta, seen, fresh
        )
        assert relative_error(second.x, x) < 1e-12
        assert relative_error(second.grad, expected) < 1e-12


@pytest.mark.parametrize(
    "rule",
    [bx.Unrolled(), bx.Truncated(2), bx.OneStep(), bx.Implicit(inexact=True), "persistent"],
    ids=lambda rule: type(rule).__name__,
)
def test_a_run_sees_all_data(rule):
    if rule == "persistent":
        rule = bx.PersistentES(jax.random.key(1), num_steps=1, num_pairs=2)
    problem, x0, theta = make_problem()
    theta["decay"] = jnp.asarray(0.0)  # convex
    x0 = x0 + 5.0  # far from both minima: the value falls with the steps
    seen = []

    def watched(step, data):
        jax.debug.callback(lambda k: seen.append(int(k)), step)
        return middle(step, data)

    # That the stream goes on is a matter of the rule; that it need not, of the solver: one rule.
    for restart in (False, True) if isinstance(rule, bx.Unrolled) else (False,):
        seen.clear()
        solver = bx.Descent(optax.sgd(0.1), 2, batches=watched, restart_batches=restart)
        method = bx.DoubleLoop(solver, rule, optax.sgd(0.01))
        bx.solve(problem, x0, theta, method, num_steps=5)
        jax.effects_barrier()
        # two steps an evaluation, or one a window; OneStep takes one more
        assert max(seen) <= 2 if restart else set(seen) >= set(range(6))


@pytest.mark.parametrize("num_examples", [1, 2, 7, 1000])
def test_an_epoch_has_every_index_once(num_examples):
    for size in {1, 2, 5, num_examples} & set(range(num_examples + 1)):
        batches = bx.Minibatches(size, key=KEY)
        steps = jnp.arange(2 * (num_examples // size))
        rows = np.asarray(jax.vmap(lambda k: batches.indices(k, num_examples))(steps))
        epochs = rows.reshape(2, -1)
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) == num_examples // size * size
            assert epoch.min() >= 0
            assert epoch.max() < num_examples
        if num_examples >= 64:
            assert not np.array_equal(epochs[0], epochs[1])


def test_every_order_is_equally_likely():
    batches = bx.Minibatches(4, key=KEY)
    orders = np.asarray(jax.vmap(lambda k: batches.indices(k, 4))(jnp.arange(24_000)))
    counts = [np.sum(np.all(orders == p, axis=1)) for p in itertools.permutations(range(4))]
    assert sum(counts) == 24_000
    # chi squared with 23 degrees of freedom: more than 50 happens once in a thousand
    assert np.sum((np.array(counts) - 1000.0) ** 2 / 1000) < 50


def test_neighbours_in_a_large_epoch_are_independent():
    batches = bx.Minibatches(50_000, key=KEY)
    order = np.asarray(batches.indices(0, 50_000)).astype(float)
    position = np.arange(50_000)
    # each correlation has a standard deviation of 1/sqrt(50,000) = 0.0045
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, position)[0, 1]) < 0.02
    again = np.asarray(batches.indices(1, 50_000)).astype(float)
    assert abs(np.corrcoef(order, again)[0, 1]) < 0.02


def test_batches_take_no_memory():
    def bytes_needed(size, num_steps):
        problem, x0, theta = make_problem(num_examples=1_000)
        solver = bx.Descent(
            optax.sgd(1e-3), num_steps, batches=bx.Minibatches(size, key=jax.random.key(0))
        )

        def grad(theta):
            return bx.hypergradient(problem, x0, theta, inner_solver=solver, rule=bx.Unrolled())[
                0
            ].grad

        return jax.jit(grad).lower(theta).compile().memory_analysis().temp_size_in_bytes

    # 10,000 stored batches would take 10,000 * size * (4 + 1 + 1) * 8 bytes: 4.8 MB for size 10
    long = bytes_needed(10, 10_000)
    assert long < 500_000
    assert bytes_needed(100, 10_000) - long < 100_000
    assert long - bytes_needed(10, 100) < 2 * 100 * 1_300  # carries of x and a cotangent


PROBLEM, X0, THETA = make_problem()
NO_DATA = bx.Bilevel(
    lambda x, t: jnp.sum((x - t["decay"]) ** 2) * jnp.sum(t["weights"]),
    lambda x, t: jnp.sum(x**2),
)
MIXED = bx.Bilevel(
    lambda x, t, d: jnp.sum((x - t["decay"]) ** 2) * jnp.sum(t["weights"]),
    lambda x, t: jnp.sum(x**2),
    inner_data={"a": jnp.ones((3, 2)), "b": jnp.ones(4)},
)
SCALAR = bx.Bilevel(MIXED.inner.fn, MIXED.outer, inner_data={"a": jnp.ones(3), "rate": 0.5})


@pytest.mark.parametrize(
    ("problem", "batches", "message"),
    [
        (NO_DATA, MINIBATCHES, "has no data"),
        (NO_DATA, middle, "has no data"),
        (MIXED, MINIBATCHES, r"inner_data\['a'\] \(3, 2\), inner_data\['b'\] \(4,\)"),
        (SCALAR, np.zeros((2, 2), int), r"inner_data\['rate'\] \(\)"),
        (PROBLEM, bx.Minibatches(12, key=KEY), "size=12.*length 11"),
        (PROBLEM, np.array([[3, 11]]), "out of range: 11.*length 11"),
    ],
)
def test_data_that_have_no_such_batches_are_refused(problem, batches, message):
    solver = bx.Descent(optax.sgd(0.1), 3, batches=batches)
    with pytest.raises(ValueError, match=message):
        bx.hypergradient(problem, X0, THETA, inner_solver=solver, rule=bx.Unrolled())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (3, TypeError, "got 3 of type int"),
        (np.zeros(3, int), ValueError, r"shape \(num_batches, batch_size\).*\(3,\)"),
        (np.zeros((2, 3)), ValueError, "float64"),
        (np.zeros((0, 3), int), ValueError, "neither of them 0"),
        (np.array([[0, -1]]), ValueError, "negative: -1"),
    ],
)
def test_batches_are_checked_at_construction(batches, error, message):
    with pytest.raises(error, match=message):
        bx.Descent(optax.sgd(0.1), 3, batches=batches)


def test_other_mistakes_are_named():
    for tolerance in ({"rtol": 1e-3}, {"atol": 1e-3}):
        with pytest.raises(ValueError, match="one batch says nothing"):
            bx.Descent(optax.sgd(0.1), 3, batches=MINIBATCHES, **tolerance)
    with pytest.raises(ValueError, match="got 0"):
        bx.Minibatches(0, key=KEY)
    for key in (0, jnp.zeros(2), jax.random.split(KEY, 3)):
        with pytest.raises(TypeError, match="one random key"):
            bx.Minibatches(3, key=key)
    bx.Minibatches(3, key=jax.random.PRNGKey(0))  # a key of the old kind


def test_indices_out_of_range_are_flagged_where_their_values_are_unknown():
    @jax.jit
    def finite(table):
        solver = bx.Descent(optax.sgd(0.1), 3, batches=table)
        estimate, _ = bx.hypergradient(
            PROBLEM, X0, THETA, inner_solver=solver, rule=bx.Unrolled(), throw=False
        )
        return estimate.result == bx.RESULTS.successful

    assert finite(jnp.array([[0, 10]]))
    assert not finite(jnp.array([[0, 11]]))
    assert not finite(jnp.array([[0, -1]]))
