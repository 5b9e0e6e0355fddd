"""Recycled: right whatever it kept, and fewer steps from one system to the next."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from bilevax import RESULTS
from bilevax._linear import verify
from bilevax._linear._recycled import Recycled
from bilevax._linear._subspace import smallest_ritz
from bilevax.linear import CG, GMRES

# Eight eigenvalues far below the others: what deflation is for.
FEW_SMALL = np.concatenate([np.linspace(1.0, 0.1, 92), np.logspace(-2, -5, 8)])


def definite(values, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return (q * values) @ q.T


def sequence(values, num_systems, drift=1e-3, dtype=np.float64):
    """`X' diag(w) X` with weights that wander, and right-hand sides that do."""
    rng = np.random.default_rng(1)
    root = definite(np.sqrt(values))
    log_weights, b = np.zeros(len(values)), rng.normal(size=len(values))
    for _ in range(num_systems):
        yield ((root * np.exp(log_weights)) @ root).astype(dtype), b.astype(dtype)
        log_weights += drift * rng.normal(size=len(values))
        b = b + drift * rng.normal(size=len(values))


@eqx.filter_jit
def resume(solver, A, b, v0, state, diagonal=None):
    preconditioner = None if diagonal is None else lambda r: r / diagonal
    solution, state = solver.resume(lambda v: A @ v, b, v0, preconditioner, state)
    return verify(solution, b, A @ solution.value), state


def run(solver, systems, diagonal=None):
    state, steps, solutions = None, [], []
    for matrix, vector in systems:
        A, b = jnp.asarray(matrix), jnp.asarray(vector)
        state = solver.start(b) if state is None else state
        solution, state = resume(solver, A, b, None, state, diagonal)
        assert bool(solution.result == RESULTS.successful), RESULTS[solution.result]
        steps.append(int(solution.num_steps))
        solutions.append(solution)
    return steps, solutions, state


def test_right_answers_in_fewer_steps():
    systems = list(sequence(FEW_SMALL, 4))
    steps, solutions, _ = run(Recycled(CG(rtol=1e-10), rank=8), systems)
    for (A, b), solution in zip(systems, solutions, strict=True):
        expected = np.linalg.solve(A, b)
        error = np.linalg.norm(solution.value - expected) / np.linalg.norm(expected)
        assert error <= 1e-9
    assert max(steps[1:]) < steps[0] / 2
    # the rank, and the product of `verify`, at every system but the first
    extra = [int(s.num_products - s.num_steps) for s in solutions]
    assert all(8 + 1 <= n <= 8 + 4 for n in extra[1:])


def test_it_learns_the_small_eigenvectors_in_one_solve():
    A, b = next(sequence(FEW_SMALL, 1))
    _, _, state = run(Recycled(CG(rtol=1e-10), rank=8), [(A, b)])
    _, vectors = np.linalg.eigh(A)
    cosines = np.linalg.svd(vectors[:, :8].T @ np.linalg.qr(np.asarray(state.W).T)[0])[1]
    assert np.all(cosines > 0.999)


def test_float32_and_a_preconditioner():
    values = np.concatenate([np.linspace(1.0, 0.1, 96), np.logspace(-2, -3, 4)])
    scale = np.random.default_rng(3).uniform(0.1, 1.0, 100)
    systems = [
        ((scale[:, None] * A * scale).astype(np.float32), b)
        for A, b in sequence(values, 3, dtype=np.float32)
    ]
    diagonal = jnp.asarray((scale**2).astype(np.float32))
    steps, solutions, state = run(Recycled(CG(rtol=1e-4), rank=4), systems, diagonal)
    assert max(steps[1:]) < steps[0] / 1.5
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.W))
    assert all(s.residual <= 2e-4 for s in solutions)


def test_without_a_state_it_is_cg():
    A, b = map(jnp.asarray, next(sequence(np.linspace(1, 20, 30), 1)))
    solver = Recycled(CG(rtol=1e-8), rank=3)
    plain = CG(rtol=1e-8).solve(lambda v: A @ v, b)
    stateless = solver.solve(lambda v: A @ v, b)
    first, _ = resume(solver, A, b, None, solver.start(b))
    np.testing.assert_array_equal(stateless.value, plain.value)
    assert int(first.num_products) == int(plain.num_products) + 1  # of `verify`
    np.testing.assert_allclose(first.value, plain.value, rtol=1e-6)
    by_lineax = lx.linear_solve(
        lx.MatrixLinearOperator(A, lx.positive_semidefinite_tag), b, solver=solver
    )
    np.testing.assert_allclose(by_lineax.value, plain.value)


def test_a_system_that_has_nothing_to_do_with_the_last_one():
    first = next(sequence(FEW_SMALL, 1))
    other = (definite(np.linspace(1, 50, 100), seed=5), np.arange(100.0))
    steps, solutions, _ = run(Recycled(CG(rtol=1e-11), rank=8), [first, other])
    np.testing.assert_allclose(solutions[1].value, np.linalg.solve(*other), atol=1e-9)
    plain = CG(rtol=1e-11).solve(lambda v: jnp.asarray(other[0]) @ v, jnp.asarray(other[1]))
    assert steps[1] < 2 * plain.num_steps


def test_a_pytree_under_vmap_and_a_rank_beyond_the_size():
    A = jnp.asarray(definite(np.logspace(0, -2, 6)))
    x = {"a": jnp.zeros((2, 2)), "b": (jnp.zeros(()), None, jnp.zeros(1))}
    _, unravel = jax.flatten_util.ravel_pytree(x)
    solver = Recycled(CG(rtol=1e-12), rank=9)

    @jax.jit
    @jax.vmap
    def solve_twice(b):
        def matvec(v):
            return unravel(A @ jax.flatten_util.ravel_pytree(v)[0])

        state = solver.start(x)
        _, state = solver.resume(matvec, unravel(b), None, None, state)
        solution, state = solver.resume(matvec, unravel(2 * b), x, None, state)
        return jax.flatten_util.ravel_pytree(solution.value)[0], solution.num_steps

    b = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)))
    values, num_steps = solve_twice(b)
    np.testing.assert_allclose(values, 2 * jnp.linalg.solve(A, b.T).T, rtol=1e-9)
    assert np.all(num_steps <= 2)


def outcome_of(A, b, state_from=None, **options):
    solver = Recycled(CG(**options), rank=3)
    A, b = jnp.asarray(A), jnp.asarray(b)
    state = solver.start(b)
    if state_from is not None:
        _, state = resume(solver, jnp.asarray(state_from), b, None, state)
    solution, state = resume(solver, A, b, None, state)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.W))
    return solution.result


@pytest.mark.parametrize("is_warm", [False, True])
def test_failures_are_flagged(is_warm):
    rng = np.random.default_rng(0)
    good = definite(np.linspace(1, 2, 12)) if is_warm else None
    b = rng.normal(size=12)
    indefinite = definite(np.concatenate([np.linspace(1, 2, 10), [-1.0, -2.0]]))
    assert bool(outcome_of(indefinite, b, good) == RESULTS.negative_curvature)
    null = np.concatenate([np.ones(5), [0.0], np.full(6, 2.0)])
    singular = outcome_of(np.diag(null), np.ones(12), good)
    assert bool(singular != RESULTS.successful)
    assert bool(outcome_of(np.full((12, 12), np.nan), b, good) == RESULTS.nonfinite)
    late = outcome_of(definite(np.logspace(0, -6, 12)), b, good, max_steps=2)
    assert bool(late == RESULTS.adjoint_not_converged)


def test_negative_curvature_that_cg_does_not_meet_is_seen_in_what_was_kept():
    # b has no part along the negative direction, but W has.
    A = np.diag([1.0, 2.0, 3.0, -1.0])
    solver, b = Recycled(CG(), rank=2), jnp.asarray([1.0, 1.0, 1.0, 0.0])
    plain, _ = resume(solver, jnp.asarray(A), b, None, solver.start(b))
    assert bool(plain.result == RESULTS.successful)
    kept = eqx.tree_at(
        lambda s: (s.W, s.is_filled), solver.start(b), (jnp.eye(4)[2:], jnp.asarray(True))
    )
    solution, _ = resume(solver, jnp.asarray(A), b, None, kept)
    assert bool(solution.result == RESULTS.negative_curvature)


def test_a_null_vector_among_those_kept_does_no_harm_to_a_consistent_system():
    A, b = jnp.diag(jnp.asarray([1.0, 2.0, 3.0, 0.0])), jnp.asarray([1.0, 1.0, 1.0, 0.0])
    solver = Recycled(CG(rtol=1e-10), rank=2)
    kept = eqx.tree_at(
        lambda s: (s.W, s.is_filled), solver.start(b), (jnp.eye(4)[2:], jnp.asarray(True))
    )
    solution, _ = resume(solver, A, b, None, kept)
    assert bool(solution.result == RESULTS.successful)
    np.testing.assert_allclose(solution.value, [1.0, 0.5, 1 / 3, 0.0], atol=1e-9)


def test_a_fixed_number_of_steps_is_taken():
    A, b = map(jnp.asarray, next(sequence(FEW_SMALL, 1)))
    solver = Recycled(CG(num_steps=7), rank=3)
    solution, state = resume(solver, A, b, None, solver.start(b))
    solution, _ = resume(solver, A, b, solution.value, state)
    assert int(solution.num_steps) == 7
    assert bool(solution.result == RESULTS.successful)


def test_smallest_ritz_of_a_dependent_basis():
    A = definite(np.linspace(1, 10, 10))
    _, vectors = np.linalg.eigh(A)
    weights = np.random.default_rng(0).normal(size=(6, 4))
    basis = jnp.asarray(weights @ vectors[:, 2:6].T)  # six rows, four dimensions
    rows, products = smallest_ritz(basis, basis @ A, 5)
    np.testing.assert_allclose(np.abs(rows[:4] @ vectors[:, 2:6]), np.eye(4), atol=1e-8)
    np.testing.assert_allclose(products[:4], rows[:4] @ A, atol=1e-7)
    np.testing.assert_array_equal(rows[4], 0)


def test_arguments():
    with pytest.raises(TypeError, match=r"must be bx.linear.CG"):
        Recycled(GMRES())
    with pytest.raises(ValueError, match="rank"):
        Recycled(rank=0)
