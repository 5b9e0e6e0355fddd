"""What every linear solver of ours promises, and what MINRES, Direct and Chebyshev add."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from test_linear import definite, outcome, plain_cg, singular_matrix, solve_dense, vector

from bilevax._linear import solve_linear, verify
from bilevax.linear import CG, GMRES, LU, MINRES, Chebyshev, Direct, GradientDescent

SOLVERS = [CG(), MINRES(), Direct(), LU(), GMRES(), Chebyshev(), GradientDescent()]
# The spectrum of definite(20, 10.0).
FIXED = {
    "CG": lambda k: CG(num_steps=k),
    "MINRES": lambda k: MINRES(num_steps=k),
    "Chebyshev": lambda k: Chebyshev(bounds=(0.1, 1.0), num_steps=k),
    "GradientDescent": lambda k: GradientDescent(1.0, num_steps=k),
}


def name_of(solver):
    return type(solver).__name__


@eqx.filter_jit
def solve_nested(solver, A, b, v0, diagonal):
    """The system in two leaves, one of them a scalar; flat vectors in and out."""

    def split(x):
        return {"a": x[1:].reshape(-1, 1), "b": (x[0], None)}

    def join(tree):
        return jnp.concatenate([tree["b"][0][None], tree["a"].ravel()])

    def matvec(v):
        return split(A @ join(v))

    solution = solver.solve(
        matvec, split(b), split(v0), lambda r: jax.tree.map(jnp.divide, r, split(diagonal))
    )
    solution = verify(solution, split(b), matvec(solution.value))
    return eqx.tree_at(lambda s: s.value, solution, join(solution.value))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_right_or_flagged(solver, dtype):
    scales = np.linspace(1, 2, 20)
    A = (definite(20, 10.0) * np.outer(scales, scales)).astype(dtype)
    b, zero = vector(20, dtype), np.zeros(20, dtype)
    diagonal = np.diag(A).copy()
    exact = np.linalg.solve(A.astype(np.float64), b)

    # one compilation for all of these
    cold = solve_nested(solver, A, b, zero, diagonal)
    assert outcome(cold.result) == "successful"
    assert cold.value.dtype == dtype
    error = np.linalg.norm(np.asarray(cold.value) - exact) / np.linalg.norm(exact)
    assert error < 40 * float(cold.tolerance)
    residual = np.linalg.norm(b - A @ np.asarray(cold.value)) / np.linalg.norm(b)
    np.testing.assert_allclose(cold.residual, residual, rtol=1e-2, atol=3e-7)
    warm = solve_nested(solver, A, b, exact.astype(dtype), diagonal)
    assert warm.num_steps == 0
    assert outcome(warm.result) == "successful"
    nothing = solve_nested(solver, A, zero, zero, diagonal)
    assert outcome(nothing.result) == "successful"
    np.testing.assert_array_equal(nothing.value, zero)
    bad_A, bad_b = A.copy(), b.copy()
    bad_A[2, 3] = bad_A[3, 2] = np.nan
    bad_b[1] = np.inf
    for system in ((bad_A, b), (A, bad_b)):
        flagged = solve_nested(solver, *system, zero, diagonal)
        assert outcome(flagged.result) == "nonfinite"
    both = eqx.filter_vmap(solve_nested, in_axes=(None, None, 0, None, None))(
        solver, A, np.stack([b, 2 * b[::-1]]), zero, diagonal
    )
    np.testing.assert_allclose(both.value[0], cold.value, rtol=1e-4, atol=1e-4)
    assert both.num_products[0] == cold.num_products


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_in_lineax_with_derivatives(solver):
    A, b = jnp.asarray(definite(8, 4.0)), jnp.asarray(vector(8))
    if hasattr(solver, "rtol"):
        solver = eqx.tree_at(lambda s: s.rtol, solver, 1e-11, is_leaf=lambda x: x is None)
    options = {"y0": b, "preconditioner": lambda r: r / jnp.diag(A)}

    @jax.jit
    def value(A, b):
        operator = lx.MatrixLinearOperator(A, lx.positive_semidefinite_tag)
        solution = lx.linear_solve(operator, b, solver, options=options)
        return jnp.sum(jnp.sin(solution.value)), solution.stats

    def plain(A, b):
        return jnp.sum(jnp.sin(jnp.linalg.solve(A, b)))

    (out, stats), gradient = jax.value_and_grad(value, (0, 1), has_aux=True)(A, b)
    np.testing.assert_allclose(out, plain(A, b), rtol=1e-9)
    for got, expected in zip(gradient, jax.grad(plain, (0, 1))(A, b), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
    assert stats["residual"] < 1e-10
    assert stats["num_steps"] >= 0
    tangents = (jnp.outer(b, b), b**2)
    np.testing.assert_allclose(
        jax.jvp(lambda *args: value(*args)[0], (A, b), tangents)[1],
        jax.jvp(plain, (A, b), tangents)[1],
        rtol=1e-8,
    )


# --- exactly K steps -----------------------------------------------------------------


def krylov_minimiser(A, b, num_steps):
    """Of the residual, over the span of A b, ..., A^K b."""
    basis = [A @ b]
    for _ in range(num_steps - 1):
        basis.append(A @ basis[-1] / np.linalg.norm(basis[-1]))
    basis, _ = np.linalg.qr(np.stack(basis, axis=1))
    return basis @ np.linalg.lstsq(A @ basis, b, rcond=None)[0]


def chebyshev_iterate(A, b, num_steps):
    """From the definition of the residual polynomial."""
    values, vectors = np.linalg.eigh(A)
    chebyshev = np.polynomial.chebyshev.Chebyshev.basis(num_steps)
    residual = chebyshev((1.1 - 2 * values) / 0.9) / chebyshev(1.1 / 0.9)
    return vectors @ ((1 - residual) / values * (vectors.T @ b))


def descent_iterate(A, b, num_steps):
    v = np.zeros_like(b)
    for _ in range(num_steps):
        v = v + (b - A @ v)
    return v


REFERENCES = {
    "CG": plain_cg,
    "MINRES": krylov_minimiser,
    "Chebyshev": chebyshev_iterate,
    "GradientDescent": descent_iterate,
}


@pytest.mark.parametrize("name", FIXED)
def test_exact_iterate_and_no_harm_beyond(name):
    A, b = definite(20, 10.0), vector(20)
    for num_steps in (1, 6):
        claim, measured = solve_dense(FIXED[name](num_steps), A, b)
        expected = REFERENCES[name](A, b, num_steps)
        np.testing.assert_allclose(claim.value, expected, rtol=1e-11, atol=1e-11)
        assert claim.num_steps == num_steps
        assert claim.tolerance is None
        assert outcome(measured.result) == "successful"
    exact = np.linalg.solve(A, b)
    for num_steps in (400, 4000):
        _, measured = solve_dense(FIXED[name](num_steps), A, b)
        assert outcome(measured.result) == "successful"
        np.testing.assert_allclose(measured.value, exact, rtol=1e-12, atol=1e-13)


# --- singular and indefinite -----------------------------------------------------------


def spectrum_matrix(eigenvalues, seed):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))
    inverse = np.where(eigenvalues == 0, 0, 1 / np.where(eigenvalues == 0, 1, eigenvalues))
    return (q * eigenvalues) @ q.T, (q * inverse) @ q.T, rng.normal(size=len(eigenvalues))


@pytest.mark.parametrize("size", [20, 120])
@pytest.mark.parametrize("solver", [MINRES, Direct], ids=lambda s: s.__name__)
def test_minimum_norm(solver, size):
    for seed in range(4):
        num_zeros = (2 + 3 * seed) * size // 20
        eigenvalues = np.concatenate([np.zeros(num_zeros), np.logspace(-4, 0, size - num_zeros)])
        A, inverse, b = spectrum_matrix(eigenvalues, seed)
        _, measured = solve_dense(solver(minimum_norm=True), A, b)
        error = np.linalg.norm(measured.value - inverse @ b) / np.linalg.norm(inverse @ b)
        assert outcome(measured.result) == "successful"
        assert error < 1e-9
        assert measured.tolerance == np.inf
        assert measured.residual > 1e-3
        _, measured = solve_dense(solver(), A, b)
        assert outcome(measured.result) == "singular"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("solver", [CG(), MINRES(), Direct()], ids=name_of)
def test_verdicts(solver, dtype):
    # A null space and a random b: CG used to stall or to run out of steps in one of six.
    for seed in range(12):
        A, _, b = spectrum_matrix(np.concatenate([np.zeros(5), np.logspace(-2, 0, 35)]), seed)
        _, measured = solve_dense(solver, A.astype(dtype), b.astype(dtype))
        assert outcome(measured.result) == "singular"
        _, measured = solve_dense(solver, A.astype(dtype), (A @ b).astype(dtype))
        assert outcome(measured.result) == "successful"
        A, _, b = spectrum_matrix(np.concatenate([[-0.01], np.logspace(-2, 0, 39)]), seed)
        _, measured = solve_dense(solver, A.astype(dtype), b.astype(dtype))
        assert outcome(measured.result) == "negative_curvature"
    # b in the null space, and no matrix at all
    A = np.diag(np.concatenate([np.zeros(20), np.linspace(1, 5, 20)]))
    b = np.concatenate([np.ones(20), np.zeros(20)])
    for matrix in (A, 0 * A):
        _, measured = solve_dense(solver, matrix.astype(dtype), b.astype(dtype))
        assert outcome(measured.result) == "singular"
        assert np.all(np.isfinite(measured.value))


@pytest.mark.parametrize("solver", [MINRES, Direct], ids=lambda s: s.__name__)
def test_indefinite_on_purpose(solver):
    eigenvalues = np.concatenate([-np.logspace(-2, 0, 8), np.logspace(-1, 1, 12)])
    A, inverse, b = spectrum_matrix(eigenvalues, 0)
    _, measured = solve_dense(solver(indefinite=True), A, b)
    assert outcome(measured.result) == "successful"
    np.testing.assert_allclose(measured.value, inverse @ b, rtol=1e-3, atol=1e-3)
    _, measured = solve_dense(solver(), A, b)
    assert outcome(measured.result) == "negative_curvature"


def test_direct_sees_what_b_does_not():
    A, b = np.diag([1.0, 2.0, -1.0]), np.array([1.0, 1.0, 0.0])
    assert outcome(solve_dense(Direct(), A, b)[1].result) == "negative_curvature"
    assert outcome(solve_dense(CG(), A, b)[1].result) == "successful"


def test_direct_that_is_not_symmetric():
    rng = np.random.default_rng(5)
    A, b = np.eye(20) + 0.15 * rng.normal(size=(20, 20)), jnp.asarray(vector(20))
    A = jnp.asarray(A)
    solution = solve_linear(Direct(), lambda v: A @ v, b, is_symmetric=False)
    np.testing.assert_allclose(solution.value, np.linalg.solve(A, b), rtol=1e-12)
    # Given as symmetric, what is not symmetric cannot be told from rounding: never silent.
    _, measured = solve_dense(Direct(), A, b)
    assert outcome(measured.result) != "successful"
    solution = lx.linear_solve(lx.MatrixLinearOperator(A), b, Direct())  # it has no tag
    np.testing.assert_allclose(solution.value, np.linalg.solve(A, b), rtol=1e-12)
    for solver in (MINRES(), Chebyshev()):
        with pytest.raises(ValueError, match="needs a symmetric"):
            solve_linear(solver, lambda v: A @ v, b, is_symmetric=False)


def test_minimum_norm_in_lineax():
    A, b = jnp.asarray(singular_matrix()), jnp.asarray(vector(20))
    operator = lx.MatrixLinearOperator(A, lx.symmetric_tag)
    expected = np.linalg.pinv(A, rcond=1e-10) @ b
    for solver in (MINRES(minimum_norm=True), Direct(minimum_norm=True)):
        # A guess, and what it has in the null space, plays no part.
        solution = lx.linear_solve(operator, b, solver, options={"y0": b})
        np.testing.assert_allclose(solution.value, expected, rtol=1e-9, atol=1e-9)


def test_chebyshev_bounds():
    A, b = definite(30, 50.0), vector(30)
    for bounds, expected in [
        (None, "successful"),
        ((0.02, 1.0), "successful"),
        ((1.0, 1.0), "successful"),  # Richardson: slow, and right
        ((0.02, 0.6), "diverged"),
    ]:
        solver = Chebyshev(bounds=bounds)
        assert outcome(solve_dense(solver, A, b)[1].result) == expected
    indefinite = A - 0.1 * np.eye(30)
    for bounds in (None, (0.02, 1.0)):
        _, measured = solve_dense(Chebyshev(bounds=bounds), indefinite, b)
        assert outcome(measured.result) == "negative_curvature"
    _, measured = solve_dense(Chebyshev(bounds=(1e-2, 1.0)), singular_matrix(), vector(20))
    assert outcome(measured.result) == "singular"
    fixed, _ = solve_dense(Chebyshev((0.02, 0.6), num_steps=200), A, b)
    assert outcome(fixed.result) == "diverged"


def test_chebyshev_takes_no_inner_product_in_its_steps():
    diagonal, b = jnp.linspace(0.1, 1.0, 6), jnp.asarray(vector(6))

    def steps(b):
        # a diagonal, so that every sum is a norm or an inner product
        return Chebyshev((0.1, 1.0), num_steps=9).solve(lambda v: diagonal * v, b).value

    jaxpr = jax.make_jaxpr(steps)(b)
    loops = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("scan", "while")]
    assert loops
    assert not any(name in str(e) for e in loops for name in ("reduce_sum", "dot_general"))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MINRES(rtol=-1.0), "rtol"),
        (lambda: MINRES(num_steps=0), "num_steps"),
        (lambda: Chebyshev(bounds=(2.0, 1.0)), "mu <= m"),
        (lambda: Chebyshev(bounds=3.0), "bounds"),
        (lambda: Chebyshev(max_steps=0), "max_steps"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
