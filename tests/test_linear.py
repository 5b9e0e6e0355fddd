"""The linear solvers: right, or flagged by name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

from bilevax import RESULTS
from bilevax._linear import verify
from bilevax.linear import CG

OUTCOMES = (
    "successful",
    "adjoint_not_converged",
    "negative_curvature",
    "singular",
    "nonfinite",
    "stalled",
    "diverged",
)


def outcome(result):
    return next(name for name in OUTCOMES if bool(result == getattr(RESULTS, name)))


def definite(size, condition, dtype=np.float64, seed=0):
    """Symmetric with eigenvalues from 1 down to 1 / condition."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return ((q * np.logspace(0, -np.log10(condition), size)) @ q.T).astype(dtype)


def vector(size, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).normal(size=size).astype(dtype)


@eqx.filter_jit
def solve(solver, A, b, v0=None, diagonal=None):
    """The solver's own claim, and what is measured of it."""
    preconditioner = None if diagonal is None else lambda r: r / diagonal
    solution = solver.solve(lambda v: A @ v, b, v0, preconditioner)
    return solution, verify(solution, b, A @ solution.value)


def solve_dense(solver, A, b, v0=None, diagonal=None):
    arrays = [None if x is None else jnp.asarray(x) for x in (A, b, v0, diagonal)]
    return solve(solver, *arrays)


def plain_cg(A, b, num_steps):
    v, r = np.zeros_like(b), b.copy()
    p = r
    for _ in range(num_steps):
        q = A @ p
        alpha = r @ r / (p @ q)
        v, new_r = v + alpha * p, r - alpha * q
        p = new_r + (new_r @ new_r) / (r @ r) * p
        r = new_r
    return v


# --- right ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol", "error"), [(np.float64, 1e-12, 1e-10), (np.float32, 1e-5, 1e-3)]
)
def test_cg_on_a_pytree(dtype, rtol, error):
    A, b = definite(20, 100.0, dtype), vector(20, dtype)

    def split(x):
        return {"matrix": x[:12].reshape(3, 4), "rest": (x[12], x[13:], x[:0], None)}

    def join(tree):
        scalar, tail, empty, _ = tree["rest"]
        return jnp.concatenate([tree["matrix"].ravel(), scalar[None], tail, empty])

    solution = jax.jit(lambda b: CG(rtol=rtol).solve(lambda v: split(jnp.asarray(A) @ join(v)), b))(
        split(jnp.asarray(b))
    )
    exact = np.linalg.solve(A.astype(np.float64), b)
    assert outcome(solution.result) == "successful"
    assert solution.value["matrix"].dtype == dtype
    assert np.linalg.norm(np.asarray(join(solution.value)) - exact) < error * np.linalg.norm(exact)
    assert solution.num_products >= solution.num_steps


@pytest.mark.parametrize("num_steps", [1, 4, 12])
def test_num_steps_is_plain_cg(num_steps):
    # Well conditioned: CG amplifies rounding errors, here those of other sums.
    A, b = definite(20, 5.0), vector(20)
    claim, measured = solve_dense(CG(num_steps=num_steps), A, b)
    np.testing.assert_allclose(claim.value, plain_cg(A, b, num_steps), rtol=1e-12, atol=1e-12)
    assert claim.num_steps == claim.num_products == num_steps
    assert claim.tolerance is None
    # Reported, not flagged; of this iterate and not of the one before.
    assert outcome(measured.result) == "successful"
    np.testing.assert_allclose(claim.residual, measured.residual, rtol=1e-9)
    residual = np.linalg.norm(b - A @ plain_cg(A, b, num_steps)) / np.linalg.norm(b)
    np.testing.assert_allclose(measured.residual, residual, rtol=1e-9)
    assert measured.num_products == num_steps + 1


def test_more_steps_than_convergence_do_no_harm():
    A, b = definite(20, 100.0), vector(20)
    claim, _ = solve_dense(CG(num_steps=500), A, b)
    np.testing.assert_allclose(claim.value, np.linalg.solve(A, b), rtol=1e-11)
    assert claim.num_steps < 100
    # Exact after one step: no division by zero.
    claim, _ = solve_dense(CG(num_steps=500), 2 * np.eye(20), b)
    np.testing.assert_allclose(claim.value, b / 2, rtol=1e-15)


def test_stops_relative_to_b_whatever_the_start():
    A, b = definite(30, 1e3), vector(30)
    exact = np.linalg.solve(A, b)
    cold, _ = solve_dense(CG(rtol=1e-3), A, b)
    near, measured = solve_dense(CG(rtol=1e-3), A, b, exact + 1e-2 * vector(30))
    done, _ = solve_dense(CG(rtol=1e-3), A, b, exact)
    assert done.num_steps == 0
    assert done.num_products == 1
    assert 2 * near.num_steps <= cold.num_steps
    assert measured.residual <= 1e-3 * (1 + 1e-9)
    # Of a bad guess nothing is left: the same digits as without one, by the same program. In
    # fewer steps than variables the number of steps does not hang on a rounding error.
    A = definite(30, 1e2)
    cold, _ = solve_dense(CG(rtol=1e-3), A, b)
    none, _ = solve_dense(CG(rtol=1e-3), A, b, np.zeros(30))
    assert cold.num_steps < 30
    assert none.num_steps == cold.num_steps
    for bad in (np.nan, 1e9):
        claim, measured = solve_dense(CG(rtol=1e-3), A, b, np.full(30, bad))
        assert outcome(measured.result) == "successful"
        np.testing.assert_array_equal(claim.value, none.value)


def test_absolute_tolerance():
    A, b = definite(30, 1e2), 1e-3 * vector(30)
    claim, _ = solve_dense(CG(rtol=0.0, atol=1e-5), A, b)
    error = np.linalg.norm(b - A @ claim.value)
    assert 1e-6 < error <= 1e-5 * (1 + 1e-9)
    np.testing.assert_allclose(claim.tolerance, 1e-5 / np.linalg.norm(b))


@pytest.mark.parametrize("v0", [None, np.ones(5)])
def test_zero_right_hand_side(v0):
    claim, measured = solve_dense(CG(), definite(5, 10.0), np.zeros(5), v0)
    np.testing.assert_array_equal(claim.value, np.zeros(5))
    assert claim.num_steps == 0
    assert outcome(measured.result) == "successful"
    assert measured.residual == 0


def test_scalar_and_empty_systems():
    solution = CG().solve(lambda v: 4.0 * v, jnp.asarray(2.0))
    assert solution.value == 0.5
    assert solution.num_steps == 1
    for empty in ({}, {"a": jnp.zeros((0,))}):
        solution = CG().solve(lambda v: v, empty)
        assert outcome(solution.result) == "successful"
        assert jax.tree_util.tree_structure(solution.value) == jax.tree_util.tree_structure(empty)


# Lineax' CG raises on the first (a test that depends on the scale), and with atol=0 stops
# after one step on right-hand sides with zeros.
def test_harmless_systems_in_float32():
    b = jnp.asarray(vector(10_000, np.float32))
    solution = CG().solve(lambda v: jnp.float32(0.1) * v, b)
    np.testing.assert_allclose(solution.value, 10 * b, rtol=1e-5)
    A = definite(30, 100.0, np.float32)
    b = np.zeros(30, np.float32)
    b[3] = 1
    claim, measured = solve_dense(CG(), A, b)
    assert outcome(measured.result) == "successful"
    assert claim.num_steps > 5
    for scale in (1e-30, 1e30):  # squares under- or overflow
        claim, measured = solve_dense(CG(), 4 * np.eye(30, dtype=np.float32), scale * (b + 1))
        np.testing.assert_allclose(claim.value, scale * (b + 1) / 4, rtol=1e-5)
        assert outcome(measured.result) == "successful"


def test_preconditioner_saves_steps():
    scales = np.logspace(0, 4, 60)
    A = definite(60, 10.0) * np.sqrt(np.outer(scales, scales))
    b = vector(60)
    plain, _ = solve_dense(CG(), A, b)
    better, measured = solve_dense(CG(), A, b, diagonal=np.diag(A))
    assert outcome(measured.result) == "successful"
    assert measured.residual <= 1e-6 * (1 + 1e-9)  # unpreconditioned
    assert 3 * better.num_steps < plain.num_steps
    claim, _ = solve_dense(CG(), A, b, diagonal=-np.diag(A))
    assert outcome(claim.result) == "adjoint_not_converged"


def test_vmap_is_a_loop():
    matrices = np.stack([definite(15, c, seed=i) for i, c in enumerate((2.0, 1e2, 1e4))])
    matrices[1, 0, 0] = np.nan
    b = np.stack([vector(15, seed=i) for i in range(3)])
    batch = eqx.filter_vmap(solve, in_axes=(None, 0, 0))(CG(), jnp.asarray(matrices), b)
    expected = ("successful", "nonfinite", "successful")
    for i in range(3):
        one = solve(CG(), jnp.asarray(matrices[i]), jnp.asarray(b[i]))
        np.testing.assert_allclose(batch[0].value[i], one[0].value, rtol=1e-6, atol=1e-9)
        assert batch[0].num_steps[i] == one[0].num_steps
        assert batch[0].num_products[i] == one[0].num_products
        assert outcome(jax.tree_util.tree_map(lambda x, i=i: x[i], batch[1].result)) == expected[i]


# --- flagged -------------------------------------------------------------------------


def singular_matrix(dtype=np.float64):
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(20, 20)))
    eigenvalues = np.concatenate([np.zeros(5), np.logspace(-2, 0, 15)])
    return ((q * eigenvalues) @ q.T).astype(dtype)


def test_negative_curvature():
    A = np.diag([1.0, -1.0, 1.0, -1.0])
    claim, measured = solve_dense(CG(), A, np.ones(4))
    assert outcome(claim.result) == outcome(measured.result) == "negative_curvature"
    np.testing.assert_array_equal(claim.value, np.zeros(4))
    A = definite(20, 10.0) - 0.2 * np.eye(20)
    claim, measured = solve_dense(CG(), A, vector(20))
    assert outcome(claim.result) == "negative_curvature"
    # The last good iterate, with its own residual.
    np.testing.assert_allclose(claim.value, plain_cg(A, vector(20), int(claim.num_steps)))
    np.testing.assert_allclose(claim.residual, measured.residual, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_singular(dtype):
    A, b = singular_matrix(dtype), vector(20, dtype)
    claim, _ = solve_dense(CG(), A, b)
    assert outcome(claim.result) == "singular"
    _, measured = solve_dense(CG(), A, A @ b)
    assert outcome(measured.result) == "successful"
    claim, _ = solve_dense(CG(), np.zeros((20, 20), dtype), b)
    assert outcome(claim.result) == "singular"


def test_precision_floor():
    b = vector(50)
    A = definite(50, 1e6)
    _, measured = solve_dense(CG(), A, b)
    assert outcome(measured.result) == "successful"
    A, b = A.astype(np.float32), b.astype(np.float32)
    claim, _ = solve_dense(CG(max_steps=10_000), A, b)
    assert outcome(claim.result) == "stalled"
    assert claim.num_steps < 5_000


def test_not_finite():
    A, b = definite(5, 10.0), vector(5)
    bad_A, bad_b = A.copy(), b.copy()
    bad_A[2, 3] = np.nan
    bad_b[1] = np.inf
    for solver in (CG(), CG(num_steps=3)):
        for system in ((bad_A, b), (A, bad_b), (bad_A, b, np.ones(5))):
            claim, measured = solve_dense(solver, *system)
            assert outcome(claim.result) == outcome(measured.result) == "nonfinite"
            assert np.all(np.isfinite(claim.value))


def test_max_steps():
    claim, _ = solve_dense(CG(max_steps=5), definite(30, 1e3), vector(30))
    assert outcome(claim.result) == "adjoint_not_converged"
    assert claim.num_steps == 5


def test_verify_does_not_believe_a_claim():
    A, b = jnp.asarray(definite(5, 10.0)), jnp.asarray(vector(5))
    solution = CG().solve(lambda v: A @ v, b)
    assert outcome(verify(solution, b, 1.1 * b).result) == "stalled"
    assert outcome(verify(solution, b, b * jnp.nan).result) == "nonfinite"
    tiny = jnp.float32(1e-30) * jnp.ones(5, jnp.float32)
    solution = CG().solve(lambda v: v, tiny)
    np.testing.assert_allclose(verify(solution, tiny, 2 * tiny).residual, 1, rtol=1e-6)


def test_bad_arguments():
    for arguments in ({"rtol": -1.0}, {"atol": -1.0}, {"max_steps": 0}, {"num_steps": 2.5}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            CG(**arguments)


# --- in other people's programs ------------------------------------------------------


def test_in_lineax():
    A, b = jnp.asarray(definite(12, 50.0)), jnp.asarray(vector(12))
    y0 = b + 1

    @jax.jit
    def value(A, b):
        operator = lx.MatrixLinearOperator(A, lx.positive_semidefinite_tag)
        solution = lx.linear_solve(operator, b, CG(rtol=1e-12), options={"y0": y0})
        return jnp.sum(jnp.sin(solution.value)), solution.stats

    (_, stats), (dA, db) = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(A, b)
    expected = jax.grad(lambda A, b: jnp.sum(jnp.sin(jnp.linalg.solve(A, b))), (0, 1))(A, b)
    np.testing.assert_allclose(dA, expected[0], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(db, expected[1], rtol=1e-8, atol=1e-8)
    assert stats["residual"] < 1e-12
    assert outcome(stats["result"]) == "successful"
    both = jax.vmap(lambda b: value(A, b)[0])(jnp.stack([b, 2 * b]))
    np.testing.assert_allclose(both[0], value(A, b)[0], rtol=1e-9)

    # What Lineax' own CG returns here is zeros and "successful".
    operator = lx.MatrixLinearOperator(A.at[0, 0].set(jnp.nan), lx.positive_semidefinite_tag)
    solution = lx.linear_solve(operator, b, CG(), throw=False)
    assert solution.result != lx.RESULTS.successful
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(lx.MatrixLinearOperator(A[:, :5]), b, CG())


def test_in_optimistix():
    A, b = jnp.asarray(definite(6, 10.0)), jnp.asarray(vector(6))

    def minimiser(theta):
        return optx.minimise(
            lambda x, theta: 0.5 * x @ A @ x - theta * (b @ x),
            optx.BFGS(rtol=1e-10, atol=1e-10),
            jnp.zeros(6),
            args=theta,
            adjoint=optx.ImplicitAdjoint(linear_solver=CG(rtol=1e-12)),
        ).value

    slope = jax.jacrev(minimiser)(jnp.asarray(2.0))
    np.testing.assert_allclose(slope, np.linalg.solve(A, b), rtol=1e-8)


# XLA on CPU (jaxlib 0.10.2) reads uninitialised memory in a float32 Hessian-vector product
# at a constant zero vector, for 20,000 samples and more: compiled alone A(0) is -inf here, and who
# begins with b - A(0) may get zeros or NaN in silence. Ours never evaluates A(0).
def test_never_evaluates_at_zero():
    n, d, k = 20_000, 784, 10
    X = jax.random.uniform(jax.random.key(0), (n, d), jnp.float32)
    x = jnp.float32(0.01) * jax.random.normal(jax.random.key(1), (d, k), jnp.float32)
    labels = jax.nn.one_hot(jnp.arange(n) % k, k, dtype=jnp.float32)

    @jax.jit
    def adjoint(x, X, labels):
        def inner(x):
            loss = -jnp.sum(jax.nn.log_softmax(X @ x) * labels) / n
            return loss + jnp.float32(0.01) * jnp.sum(x**2)

        b = jax.grad(inner)(x) + jnp.float32(0.01)
        _, matvec = jax.linearize(jax.grad(inner), x)
        solution = CG(rtol=1e-3).solve(matvec, b)
        return solution, verify(solution, b, matvec(solution.value))

    claim, measured = adjoint(x, X, labels)
    assert outcome(measured.result) == "successful"
    assert 0 < claim.num_steps < 50
    assert jnp.linalg.norm(claim.value) > 1e-3

    calls = []
    CG().solve(lambda v: calls.append(v) or v, jnp.ones(3))
    assert len(calls) == 1  # in the loop, nowhere else
