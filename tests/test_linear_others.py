"""Gradient descent, Neumann series, GMRES, and Lineax' solvers behind the adapter."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from test_linear import definite, outcome, singular_matrix, solve_dense, vector

from bilevax._linear import GMRES, default_linear_solver, solve_linear, verify
from bilevax._linear._common import largest_eigenvalue
from bilevax.linear import CG, Direct, GradientDescent, Neumann


@eqx.filter_jit
def run(solver, A, b, is_symmetric=True):
    A, b = jnp.asarray(A), jnp.asarray(b)
    solution = solve_linear(solver, lambda v: A @ v, b, is_symmetric=is_symmetric)
    return solution, verify(solution, b, A @ solution.value)


def neumann_sum(A, b, num_terms, step_size):
    step = np.eye(len(b)) - step_size * A
    return step_size * sum(np.linalg.matrix_power(step, j) @ b for j in range(num_terms))


def nonsymmetric(dtype=np.float64):
    rng = np.random.default_rng(5)
    return (np.eye(20) + 0.15 * rng.normal(size=(20, 20))).astype(dtype)


# --- gradient descent and Neumann ------------------------------------------------------


def test_neumann_is_gradient_descent_is_the_sum():
    A, b = definite(10, 10.0), vector(10)
    series, measured = solve_dense(Neumann(7, step_size=0.7), A, b)
    descent, _ = solve_dense(GradientDescent(0.7, num_steps=7), A, b)
    expected = neumann_sum(A, b, 7, 0.7)
    np.testing.assert_allclose(series.value, expected, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(descent.value, expected, rtol=1e-14, atol=1e-15)
    assert (series.num_steps, series.num_products) == (7, 6)
    assert (descent.num_steps, descent.num_products) == (7, 7)
    # Reported, not flagged.
    assert outcome(measured.result) == outcome(descent.result) == "successful"
    residual = np.linalg.norm(b - A @ expected) / np.linalg.norm(b)
    np.testing.assert_allclose([measured.residual, descent.residual], residual, rtol=1e-10)
    assert Neumann(1, step_size=0.5).solve(lambda v: v, jnp.asarray(3.0)).value == 1.5


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gradient_descent_converges(dtype):
    A, b = definite(20, 30.0, dtype), vector(20, dtype)
    exact = np.linalg.solve(A.astype(np.float64), b)
    claim, measured = solve_dense(GradientDescent(), A, b)
    assert outcome(measured.result) == "successful"
    assert claim.num_products == claim.num_steps + 10
    assert np.linalg.norm(np.asarray(claim.value) - exact) < 30 * float(
        claim.tolerance
    ) * np.linalg.norm(b)
    warm, _ = solve_dense(GradientDescent(), A, b, exact.astype(dtype))
    assert warm.num_steps == 0


def test_step_size_is_safe():
    # b orthogonal to the leading eigenvectors, in every shape of spectrum; a step is safe
    # below twice the inverse of the largest eigenvalue.
    @jax.jit
    def estimate(spectrum):
        first = jnp.zeros(spectrum.size).at[0].set(1.0)
        return largest_eigenvalue(lambda v: spectrum * v, first)

    for size in (10, 10_000):
        index = np.arange(size)
        for spectrum in (
            np.linspace(0.0, 1.0, size),
            np.logspace(-4.0, 0.0, size),
            np.where(index == size - 1, 1.0, 0.5),
            np.where(index == size - 1, 1.0, 1e-3),
        ):
            assert 0.8 < estimate(spectrum) <= 1 + 1e-9


def test_gradient_descent_flags():
    A, b = definite(20, 30.0), vector(20)
    cases = [
        (GradientDescent(step_size=2.2), A, "diverged"),
        (GradientDescent(step_size=4.0, num_steps=50), A, "diverged"),
        (GradientDescent(), -A, "negative_curvature"),
        (GradientDescent(), np.diag(np.linspace(-0.01, 1, 20)), "negative_curvature"),
        (GradientDescent(), singular_matrix(), "singular"),
        (GradientDescent(), np.full((20, 20), np.nan), "nonfinite"),
        (GradientDescent(max_steps=10), A, "adjoint_not_converged"),
    ]
    for solver, matrix, expected in cases:
        claim, measured = solve_dense(solver, matrix, b)
        assert outcome(claim.result) == outcome(measured.result) == expected
    A32, b32 = A.astype(np.float32), b.astype(np.float32)
    claim, _ = solve_dense(GradientDescent(rtol=1e-9), A32, b32)
    assert outcome(claim.result) == "stalled"


def test_gradient_descent_needs_no_regular_matrix():
    # B'v sees the range alone; there the steps converge though |v| grows.
    A, b = singular_matrix(), vector(20)
    claim, measured = solve_dense(GradientDescent(num_steps=4000), A, b)
    np.testing.assert_allclose(A @ claim.value, A @ np.linalg.pinv(A) @ b, rtol=1e-9, atol=1e-9)
    assert outcome(measured.result) == "successful"
    assert measured.residual > 0.1


def test_neumann_flags():
    A, b = definite(20, 30.0), vector(20)
    for solver, matrix, expected in [
        (Neumann(30, step_size=3.0), A, "diverged"),
        (Neumann(500, step_size=1e9), A, "diverged"),
        (Neumann(30), np.diag(np.linspace(-1, 2, 20)), "diverged"),
        (Neumann(3), np.full((20, 20), np.nan), "nonfinite"),
    ]:
        claim, _ = solve_dense(solver, matrix, b)
        assert outcome(claim.result) == expected


def test_systems_that_are_not_symmetric():
    A, b = nonsymmetric(), vector(20)
    series, measured = run(Neumann(40), A, b, is_symmetric=False)
    np.testing.assert_allclose(series.value, neumann_sum(A, b, 40, 1.0), rtol=1e-12)
    assert measured.residual < 1e-3
    _, measured = run(GradientDescent(), A, b, is_symmetric=False)
    assert outcome(measured.result) == "successful"
    for solver in (CG(), lx.CG(1e-6, 1e-6), lx.Cholesky()):
        with pytest.raises(ValueError, match="needs a symmetric"):
            run(solver, A, b, is_symmetric=False)


# --- GMRES -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("restart", [20, 6])
def test_gmres(dtype, restart):
    A, b = nonsymmetric(dtype), vector(20, dtype)
    b[4:8] = 0
    exact = np.linalg.solve(A.astype(np.float64), b)
    claim, measured = solve_dense(GMRES(restart=restart), A, b)
    assert outcome(measured.result) == "successful"
    assert np.linalg.norm(np.asarray(claim.value) - exact) < 50 * float(
        claim.tolerance
    ) * np.linalg.norm(exact)
    assert claim.num_steps <= (20 if restart == 20 else 60)
    np.testing.assert_allclose(claim.residual, measured.residual, rtol=1e-2)
    warm, _ = solve_dense(GMRES(restart=restart), A, b, exact.astype(dtype))
    assert warm.num_steps == 0
    _, measured = solve_dense(GMRES(restart=restart), 3 * A, b, diagonal=3 * np.diag(A))
    assert outcome(measured.result) == "successful"


def test_gmres_flags():
    A, b = nonsymmetric(), vector(20)
    rotation = np.roll(np.eye(20), 1, axis=0)  # no progress until the last step
    for solver, matrix, expected in [
        (GMRES(restart=5), rotation, "adjoint_not_converged"),
        (GMRES(), singular_matrix(), "adjoint_not_converged"),
        (GMRES(max_steps=1, restart=3, rtol=1e-12), A, "adjoint_not_converged"),
        (GMRES(), np.full((20, 20), np.nan), "nonfinite"),
    ]:
        claim, measured = solve_dense(solver, matrix, b)
        assert outcome(claim.result) == outcome(measured.result) == expected
    _, measured = solve_dense(GMRES(rtol=1e-18), A, b)
    assert outcome(measured.result) == "stalled"
    _, measured = solve_dense(GMRES(), rotation, b)
    assert outcome(measured.result) == "successful"
    claim, _ = solve_dense(GMRES(), A, np.zeros(20))
    assert claim.num_steps == 0
    np.testing.assert_array_equal(claim.value, np.zeros(20))


def test_gmres_on_a_pytree_under_vmap():
    A = jnp.asarray(nonsymmetric())

    def matvec(v):
        out = A @ jnp.concatenate([v["a"].ravel(), v["b"][None]])
        return {"a": out[:19].reshape(19, 1), "b": out[19]}

    b = {"a": jnp.asarray(vector(38).reshape(2, 19, 1)), "b": jnp.asarray([0.5, 0.0])}
    solution = jax.jit(jax.vmap(lambda b: GMRES(rtol=1e-10).solve(matvec, b)))(b)
    flat = np.concatenate([b["a"].reshape(2, 19), b["b"][:, None]], axis=1)
    expected = np.linalg.solve(A, flat.T).T
    np.testing.assert_allclose(solution.value["a"][..., 0], expected[:, :19], atol=1e-8)
    np.testing.assert_allclose(solution.value["b"], expected[:, 19], atol=1e-8)


def test_default_linear_solver():
    assert default_linear_solver(True, 33) == CG()
    assert default_linear_solver(True, 32) == Direct()
    assert default_linear_solver(False, 5) == GMRES()


# --- Lineax ----------------------------------------------------------------------------

SYMMETRIC = [lx.CG(1e-8, 1e-8), lx.Cholesky()]
FULL_RANK = [
    lx.LU(),
    lx.QR(),
    lx.GMRES(1e-8, 1e-8),
    lx.BiCGStab(1e-8, 1e-8),
    lx.AutoLinearSolver(well_posed=True),
    lx.Normal(lx.CG(1e-8, 1e-8)),
    lx.Normal(lx.Cholesky()),
]
ANY_RANK = [lx.SVD(), lx.LSMR(1e-10, 1e-10), lx.AutoLinearSolver(well_posed=False)]


def name_of(solver):
    return f"{type(solver).__name__}({type(getattr(solver, 'inner_solver', None)).__name__})"


@pytest.mark.parametrize("solver", SYMMETRIC + FULL_RANK + ANY_RANK, ids=name_of)
def test_every_lineax_solver_is_checked(solver):
    A = definite(20, 10.0) if solver in SYMMETRIC else nonsymmetric()
    is_symmetric, b = solver in SYMMETRIC, vector(20)
    b[4:8] = 0
    claim, measured = run(solver, A, b, is_symmetric)
    assert outcome(claim.result) == outcome(measured.result) == "successful"
    np.testing.assert_allclose(claim.value, np.linalg.solve(A, b), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        claim.residual,
        np.linalg.norm(b - A @ claim.value) / np.linalg.norm(b),
        rtol=1e-6,
        atol=1e-15,
    )
    assert claim.num_products > 0
    # The same program, other numbers: Lineax says "successful" to several of these.
    bad_A, bad_b = A.copy(), b.copy()
    bad_A[3, 2] = bad_A[2, 3] = bad_b[0] = np.nan
    for system in ((bad_A, b), (A, bad_b)):
        claim, measured = run(solver, *system, is_symmetric)
        assert outcome(claim.result) == outcome(measured.result) == "nonfinite"
        assert np.all(np.isfinite(claim.value))
    claim, _ = run(solver, A, np.zeros(20), is_symmetric)
    assert outcome(claim.result) == "successful"
    np.testing.assert_array_equal(claim.value, np.zeros(20))
    # Singular and inconsistent: least squares, or flagged.
    A = singular_matrix()
    claim, measured = run(solver, A, vector(20), is_symmetric)
    if solver in ANY_RANK:
        assert outcome(claim.result) == outcome(measured.result) == "successful"
        assert claim.tolerance == np.inf
        assert claim.residual > 0.1
        np.testing.assert_allclose(claim.value, np.linalg.pinv(A) @ vector(20), atol=1e-5)
    else:
        expected = ("singular", "stalled", "adjoint_not_converged")
        assert outcome(claim.result) in expected
        assert outcome(measured.result) in expected


def test_lineax_tolerances_are_measured():
    A, b = definite(50, 1e6), vector(50)
    claim, _ = run(lx.CG(1e-6, 0.0, max_steps=20), A, b)
    assert outcome(claim.result) == "adjoint_not_converged"
    np.testing.assert_allclose(claim.tolerance, 1e-6)
    # Half the digits of the normal equations are gone: LSMR claims success.
    claim, _ = run(lx.Normal(lx.CG(1e-5, 1e-5)), A, b)
    assert (outcome(claim.result) == "successful") == (claim.residual <= 2 * claim.tolerance)


@pytest.mark.parametrize("solver", [lx.LSMR(1e-6, 1e-6), lx.CG(1e-5, 1e-5), lx.LU()], ids=name_of)
def test_lineax_in_float32(solver):
    A, b = definite(20, 10.0, np.float32), vector(20, np.float32)
    claim, measured = run(solver, A, b)
    assert outcome(measured.result) == "successful"
    assert claim.value.dtype == np.float32
    np.testing.assert_allclose(claim.value, np.linalg.solve(A, b), rtol=1e-2, atol=1e-3)


def test_lineax_takes_guess_and_preconditioner():
    scales = np.logspace(0, 4, 30)
    A = jnp.asarray(definite(30, 10.0) * np.sqrt(np.outer(scales, scales)))
    b, diagonal = jnp.asarray(vector(30)), jnp.diag(A)
    exact = jnp.linalg.solve(A, b)
    steps = [
        solve_linear(lx.CG(1e-6, 1e-6), lambda v: A @ v, b, v0, preconditioner).num_steps
        for v0, preconditioner in ((None, None), (exact, None), (None, lambda r: r / diagonal))
    ]
    assert 2 * max(steps[1:]) < steps[0]
