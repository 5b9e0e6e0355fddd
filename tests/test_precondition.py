"""Preconditioners: their formulas, definite whatever the Hessian, renewed when they pay."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevax import LBFGS, Descent, Minimum, Optimistix
from bilevax._precondition import (
    AdamState,
    Jacobi,
    Nystrom,
    QuasiNewton,
    as_preconditioner,
)
from bilevax._precondition._probes import signs, unit_vectors
from bilevax.linear import CG

DTYPES = (np.float64, np.float32)


def definite(values, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return (q * values) @ q.T


def prepare(preconditioner, A, state=None, inner_state=None):
    """Of a matrix: `apply`, the state, the products."""
    x = jnp.zeros(len(A), A.dtype)
    state = preconditioner.init(x) if state is None else state
    return preconditioner.prepare(lambda v: A @ v, None, x, None, inner_state, state)


def as_matrix(apply, A):
    return np.asarray(jax.vmap(apply)(jnp.eye(len(A), dtype=A.dtype)))


def assert_definite(matrix, tolerance=0.0):
    assert np.all(np.isfinite(matrix))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-4 * np.abs(matrix).max())
    values = np.linalg.eigvalsh(0.5 * (matrix + matrix.T).astype(np.float64))
    assert values[0] > -tolerance * values[-1]
    return values


# --- the interface -------------------------------------------------------------------


def test_a_function_is_a_preconditioner():
    wrapped = as_preconditioner(lambda x, theta: lambda r: theta * r)
    apply, state, num_products = wrapped.prepare(None, None, jnp.ones(2), 3.0, None, None)
    assert apply(2.0) == 6.0
    assert (wrapped.init(jnp.ones(2)), state, int(num_products)) == (None, None, 0)
    assert wrapped.learn(None, 5) is None


def test_what_is_and_is_not_a_preconditioner():
    assert as_preconditioner(None) is None
    nystrom = Nystrom(3)
    assert as_preconditioner(nystrom) is nystrom
    for bad in (3, "jacobi", Jacobi):
        with pytest.raises(TypeError, match="must be one of bx.precondition"):
            as_preconditioner(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Nystrom(0),
        lambda: Nystrom(2.5),
        lambda: Nystrom(2, damping=-1.0),
        lambda: Jacobi(num_probes=0),
        lambda: AdamState(eps=0.0),
    ],
)
def test_bad_arguments_raise_at_construction(make):
    with pytest.raises(ValueError, match="must"):
        make()


# --- probes --------------------------------------------------------------------------


def test_signs_are_signs_and_differ_between_rows_and_leaves():
    x = {"a": jnp.zeros((20, 20)), "b": jnp.zeros(400), "c": None}
    rows = signs(x, 30)
    flat = np.concatenate([rows["a"].reshape(30, -1), rows["b"]], axis=1)
    assert set(np.unique(flat)) == {-1.0, 1.0}
    # 30 rows of 800 fair coins: correlations of 1 / sqrt(800) = 0.035
    correlation = flat @ flat.T / 800 - np.eye(30)
    assert 0.02 < np.sqrt(np.mean(correlation**2)) < 0.05
    assert np.abs(np.mean(flat[:, :400] * flat[:, 400:])) < 0.03
    assert np.linalg.matrix_rank(flat) == 30


def test_unit_vectors_of_a_pytree():
    x = {"a": jnp.zeros((2, 2)), "b": (jnp.zeros(()), jnp.zeros(3), jnp.zeros(0))}
    rows = unit_vectors(x)
    flat = jax.vmap(lambda t: jax.flatten_util.ravel_pytree(t)[0])(rows)
    np.testing.assert_array_equal(flat, np.eye(8))


# --- Jacobi --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_jacobi_is_the_exact_diagonal_of_a_small_matrix(dtype):
    A = jnp.asarray(definite(np.linspace(1, 9, 30)).astype(dtype))
    apply, _, num_products = prepare(Jacobi(), A)
    assert num_products == 30
    r = jnp.linspace(1, 2, 30, dtype=dtype)
    np.testing.assert_allclose(apply(r), r / jnp.diag(A), rtol=1e-5)


def test_jacobi_estimates_a_large_diagonal_and_saves_steps():
    rng = np.random.default_rng(0)
    scale = np.logspace(0, -1.5, 200)
    A = jnp.asarray(scale[:, None] * definite(np.linspace(0.9, 1.1, 200)) * scale)
    apply, _, num_products = prepare(Jacobi(), A)
    assert num_products == 16
    ratio = np.asarray(apply(jnp.diag(A)))
    assert np.all((ratio > 0.2) & (ratio < 2.0))
    b = jnp.asarray(rng.normal(size=200))
    plain = CG().solve(lambda v: A @ v, b)
    assert int(CG().solve(lambda v: A @ v, b, None, apply).num_steps) < int(plain.num_steps) / 5


def test_jacobi_is_definite_where_the_diagonal_is_not():
    entries = jnp.asarray([2.0, -1.0, 0.0, jnp.nan, jnp.inf, 4.0])
    x = jnp.zeros(6)
    # The entries alone: 0 * NaN of the other columns is no matter here.
    apply, _, _ = Jacobi().prepare(
        lambda v: jnp.where(v != 0, entries, 0.0), None, x, None, None, Jacobi().init(x)
    )
    np.testing.assert_allclose(1 / apply(jnp.ones(6)), [2.0, 3.0, 3.0, 3.0, 3.0, 4.0])


# --- Nystrom -------------------------------------------------------------------------


def test_nystrom_is_its_formula():
    A = definite(np.logspace(0, -4, 40))
    S = np.asarray(signs(jnp.zeros(40), 12))
    approximation = A @ S.T @ np.linalg.solve(S @ A @ S.T, S @ A)
    values, vectors = np.linalg.eigh(approximation)
    values, U = values[:-13:-1], vectors[:, :-13:-1]
    for damping in (0.0, 1e-3):
        inverse = (U * ((values[-1] + damping) / (values + damping))) @ U.T
        expected = inverse + np.eye(40) - U @ U.T
        apply, _, num_products = prepare(Nystrom(12, damping or None), jnp.asarray(A))
        assert num_products == 12
        np.testing.assert_allclose(as_matrix(apply, A), expected, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nystrom_on_a_pytree_is_nystrom_on_the_vector(dtype):
    # The signs of a pytree are others, so that the full rank is compared: A^{-1}, scaled.
    A = definite(np.linspace(1, 5, 12)).astype(dtype)
    x = {"a": jnp.zeros((2, 3), dtype), "b": (jnp.zeros((), dtype), None, jnp.zeros(5, dtype))}
    _, unravel = jax.flatten_util.ravel_pytree(x)
    preconditioner = Nystrom(50)
    apply, state, num_products = preconditioner.prepare(
        lambda v: unravel(A @ jax.flatten_util.ravel_pytree(v)[0]),
        *(None, x, None, None, preconditioner.init(x)),
    )
    assert num_products == 12
    rows = jax.vmap(lambda r: jax.flatten_util.ravel_pytree(apply(unravel(r)))[0])
    np.testing.assert_allclose(rows(jnp.eye(12, dtype=dtype)), np.linalg.inv(A), atol=1e-5)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((state.U, state.values)))


def test_nystrom_reduces_the_steps_as_published():
    """The digest: 642 steps of CG, 239 with rank 20, 41 with rank 50."""
    values = np.maximum(np.exp(-np.arange(400) / 4.0), 1 / 9e5)
    A = jnp.asarray(definite(values))
    b = jnp.asarray(np.random.default_rng(1).normal(size=400))
    solver = CG(rtol=1e-8)
    solve = eqx.filter_jit(lambda apply: solver.solve(lambda v: A @ v, b, None, apply))
    plain = solve(None).num_steps
    steps = [int(solve(prepare(Nystrom(rank), A)[0]).num_steps) for rank in (20, 50)]
    assert 300 < plain < 800
    assert steps[0] < int(plain) / 2
    assert steps[1] < int(plain) / 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 7, 30])
@pytest.mark.parametrize("kind", ["definite", "semidefinite", "indefinite", "negative", "nan", "0"])
def test_nystrom_is_definite_whatever_the_hessian(kind, rank, dtype):
    values = {
        "definite": np.logspace(0, -6, 30),
        "semidefinite": np.repeat([1.0, 0.0], 15),
        "indefinite": np.linspace(1, -1, 30),
        "negative": -np.linspace(1, 2, 30),
        "nan": np.full(30, np.nan),
        "0": np.zeros(30),
    }[kind]
    A = definite(values).astype(dtype)
    apply, state, _ = prepare(Nystrom(rank), jnp.asarray(A))
    assert_definite(as_matrix(apply, A), tolerance=1e-5 if dtype == np.float32 else 1e-12)
    if kind in ("negative", "nan", "0"):
        np.testing.assert_array_equal(as_matrix(apply, A), np.eye(30))
    assert bool(state.is_usable) == (kind in ("definite", "semidefinite")) or kind == "indefinite"


# --- renewal -------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [Nystrom(4), Jacobi(num_probes=4)])
def test_it_is_kept_until_the_lost_steps_have_paid_for_a_new_one(preconditioner):
    A = jnp.asarray(definite(np.linspace(1, 2, 10)))

    @jax.jit
    def step(factor, state, num_steps):
        apply, state, num_products = prepare(preconditioner, factor * A, state)
        return apply(jnp.ones(10)), preconditioner.learn(state, num_steps), num_products

    state = preconditioner.init(jnp.zeros(10))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    spent = []
    # 30 steps right after it was made; then 2 lost, 2 lost: four, the price of a new one.
    for factor, num_steps in ((1.0, 30), (3.0, 32), (3.0, 32), (3.0, 30), (3.0, 33), (3.0, 28)):
        _, state, num_products = step(jnp.asarray(factor), state, jnp.asarray(num_steps))
        spent.append(int(num_products))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    assert spent == [4, 0, 0, 4, 0, 0]


def test_one_that_could_not_be_made_is_tried_again():
    preconditioner = Nystrom(4)
    A = jnp.asarray(definite(np.linspace(1, 2, 10)))
    _, state, first = prepare(preconditioner, -A)
    state = preconditioner.learn(state, jnp.asarray(10))
    _, state, second = prepare(preconditioner, A, state)
    assert (int(first), int(second), bool(state.is_usable)) == (4, 4, True)


# --- what the inner solver knows -----------------------------------------------------


VALUES = np.logspace(0, -3, 30)


def quadratic(x, theta):
    A = jnp.asarray(definite(VALUES))
    return 0.5 * x @ (A @ x) - theta * jnp.sum(x)


def test_quasi_newton_takes_the_pairs_of_the_inner_lbfgs():
    condition, x0, theta = Minimum(quadratic), jnp.zeros(30), jnp.asarray(1.0)
    inner = Optimistix(LBFGS(rtol=1e-8, history_length=40))
    empty = inner.init(condition, x0, theta)
    _, state = eqx.filter_jit(inner.solve)(condition, x0, theta, empty)
    assert jax.tree.structure(empty) == jax.tree.structure(state)
    A = jnp.asarray(definite(VALUES))
    apply, _, num_products = prepare(QuasiNewton(), A, None, {"somewhere": state})
    assert num_products == 0
    values = assert_definite(as_matrix(apply, A) @ np.eye(30))
    assert values[0] > 0
    # L-BFGS with room for all its pairs has found the inverse along b = (1, ..., 1).
    b = jnp.ones(30)
    plain = CG(rtol=1e-6).solve(lambda v: A @ v, b)
    solved = CG(rtol=1e-6).solve(lambda v: A @ v, b, None, apply)
    assert int(solved.num_steps) < int(plain.num_steps) / 2
    np.testing.assert_allclose(A @ solved.value, b, atol=1e-5)


@pytest.mark.parametrize("length", [np.nan, np.inf, 0.0])
def test_quasi_newton_without_usable_pairs_is_the_identity(length):
    condition = Minimum(quadratic)
    history = Optimistix(LBFGS()).init(condition, jnp.zeros(30), jnp.asarray(1.0))
    broken = eqx.tree_at(lambda h: h.length, history, jnp.asarray(length))
    for state in (history, broken):
        apply, _, _ = prepare(QuasiNewton(), jnp.eye(30), None, state)
        np.testing.assert_array_equal(apply(jnp.ones(30)), np.ones(30))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_state_divides_by_the_root_of_the_second_moment(dtype):
    inner = Descent(optax.chain(optax.clip(1.0), optax.adam(1e-2)), num_steps=5)
    x0, theta = jnp.ones(3, dtype), jnp.asarray(1.0, dtype)
    condition = Minimum(lambda x, theta: 0.5 * jnp.sum(jnp.asarray([1, 0.1, 0], dtype) * x**2))
    _, state = inner.solve(condition, x0, theta, inner.init(condition, x0, theta))
    apply, _, num_products = prepare(AdamState(eps=1e-2), jnp.eye(3, dtype=dtype), None, state)
    roots = jnp.sqrt(state[1][0].nu)
    assert num_products == 0
    np.testing.assert_allclose(apply(jnp.ones(3, dtype)), 1 / (roots / roots[0] + 1e-2), rtol=1e-5)
    assert apply(jnp.ones(3, dtype)).dtype == dtype


def test_adam_state_of_zeros_and_nan_is_the_identity():
    for nu in (jnp.zeros(3), jnp.full(3, jnp.nan)):
        state = (optax.ScaleByAdamState(count=jnp.zeros(()), mu=nu, nu=nu),)
        apply, _, _ = prepare(AdamState(), jnp.eye(3), None, state)
        np.testing.assert_array_equal(apply(jnp.ones(3)), np.ones(3))


def test_they_say_which_inner_solver_they_need():
    with pytest.raises(TypeError, match=r"QuasiNewton\(\) needs inner_solver=bx.LBFGS"):
        prepare(QuasiNewton(), jnp.eye(2))
    with pytest.raises(TypeError, match=r"AdamState\(\) needs inner_solver=bx.Descent"):
        prepare(AdamState(), jnp.eye(2), None, (optax.EmptyState(),))
