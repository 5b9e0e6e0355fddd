"""Preconditioners of systems that are not symmetric: one `A^{-1}` for all directions."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import bilevax as bx

SIZE = 12
RANDOM = np.random.default_rng(3)
M = RANDOM.normal(size=(SIZE, SIZE)) / SIZE**0.5 + np.diag(np.linspace(1.0, 30.0, SIZE))
C = RANDOM.normal(size=(SIZE, SIZE))
CONDITIONS = {
    "root": lambda M: bx.Root(lambda x, t: M @ x - jnp.asarray(C, M.dtype) @ t),
    "fixed point": lambda M: bx.FixedPoint(lambda x, t: x - M @ x + jnp.asarray(C, M.dtype) @ t),
}


def exact_inverse(x, theta):
    del theta
    inverse = jnp.asarray(np.linalg.inv(M), x.dtype)
    return lambda r: inverse @ r


def rule_with(preconditioner=exact_inverse, num_steps=2, kind=bx.Implicit, **more):
    # So few steps solve the system only with the right preconditioner.
    solver = bx.linear.GMRES(max_steps=num_steps)
    return kind(linear_solver=solver, preconditioner=preconditioner, **more)


def case(name, dtype=np.float64):
    theta = jnp.asarray(np.linspace(-1, 1, SIZE), dtype)
    condition = CONDITIONS[name](jnp.asarray(M, dtype))
    problem = bx.Bilevel(condition, lambda x, t: 0.5 * jnp.sum((x - 1) ** 2))
    x = np.linalg.solve(M, C @ np.asarray(theta, np.float64))
    grad = C.T @ np.linalg.solve(M.T, x - 1)
    return problem, condition, theta, x, grad


@pytest.mark.parametrize(
    ("name", "dtype"), [("root", np.float64), ("root", np.float32), ("fixed point", np.float64)]
)
def test_hypergradient(name, dtype):
    problem, _, theta, x, grad = case(name, dtype)
    start = jnp.asarray(x, dtype)
    estimate, _ = bx.hypergradient(problem, start, theta, rule=rule_with())
    np.testing.assert_allclose(estimate.grad, grad, rtol=1e-9 if dtype == np.float64 else 2e-4)
    assert int(estimate.stats["num_adjoint_steps"]) <= 2


def test_all_directions_of_argmin_and_second_derivatives():
    _, condition, theta, x, _ = case("fixed point")
    solution = bx.argmin(condition, rule=rule_with())
    start = jnp.asarray(x)
    jacobian = np.linalg.solve(M, C)

    def loss(t):
        return 0.5 * jnp.sum((solution(start, t) - 1) ** 2)

    @jax.jit
    def derivatives(t, d):
        along = jax.jvp(lambda t: solution(start, t), (t,), (d,))[1]
        return jax.grad(loss)(t), along, jax.jvp(jax.grad(loss), (t,), (d,))[1]

    d = jnp.ones(SIZE)
    grad, along, curvature = derivatives(theta, d)
    np.testing.assert_allclose(grad, jacobian.T @ (x - 1), rtol=1e-8)
    np.testing.assert_allclose(along, jacobian @ d, rtol=1e-8)
    np.testing.assert_allclose(curvature, jacobian.T @ (jacobian @ d), rtol=1e-8)


@pytest.mark.parametrize("num_theta", [2, SIZE + 1], ids=["forward", "reverse"])
def test_jacobian_both_ways(num_theta):
    D = RANDOM.normal(size=(SIZE, num_theta))
    problem = bx.Bilevel(bx.Root(lambda x, t: M @ x - D @ t), lambda x, t: jnp.sum(x))
    theta = jnp.ones(num_theta)
    x = jnp.asarray(np.linalg.solve(M, D @ theta))
    found = bx.jacobian(problem, x, theta, rule=rule_with())
    np.testing.assert_allclose(found.value, np.linalg.solve(M, D), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "more", [{"kind": bx.Polished}, {"kind": bx.Accurate, "rtol": 1e-6}], ids=str
)
def test_evidence_preconditions_both_of_its_systems(more):
    problem, _, theta, x, grad = case("root")
    start = jnp.asarray(x)
    estimate, _ = bx.hypergradient(problem, start, theta, rule=rule_with(num_steps=3, **more))
    np.testing.assert_allclose(estimate.grad, grad, rtol=1e-6)


def test_derivative_of_the_hypergradient():
    problem, _, theta, x, _ = case("root")
    start, rule, d = jnp.asarray(x), rule_with(), jnp.ones(SIZE)

    def grad(t):
        return bx.hypergradient(problem, start, t, rule=rule)[0].grad

    jacobian = np.linalg.solve(M, C)
    along = jax.jit(lambda t, d: jax.jvp(grad, (t,), (d,))[1])(theta, d)
    np.testing.assert_allclose(along, jacobian.T @ (jacobian @ d), rtol=1e-8)


@pytest.mark.parametrize(
    "preconditioner",
    [bx.precondition.Jacobi(), bx.precondition.Nystrom(4)],
    ids=["Jacobi", "Nystrom"],
)
def test_symmetric_preconditioners_serve_too(preconditioner):
    problem, _, theta, x, grad = case("root")
    rule = rule_with(preconditioner, num_steps=200)
    estimate, _ = bx.hypergradient(problem, jnp.asarray(x), theta, rule=rule)
    np.testing.assert_allclose(estimate.grad, grad, rtol=1e-5)


def test_a_solver_of_lineax_takes_the_transpose_too():
    problem, _, theta, x, grad = case("root")
    rule = bx.Implicit(lx.BiCGStab(1e-10, 1e-10, max_steps=3), preconditioner=exact_inverse)
    estimate, _ = bx.hypergradient(problem, jnp.asarray(x), theta, rule=rule)
    np.testing.assert_allclose(estimate.grad, grad, rtol=1e-7)


def with_tree(x, theta):
    return lambda r: {"a": jnp.linalg.solve(M, r["a"])}


def with_scan(x, theta):
    inverse = jnp.asarray(np.linalg.inv(M))
    return lambda r: jax.lax.scan(lambda c, row: (c, row @ r), None, inverse)[1]


def with_own_transpose(x, theta):
    inverse = np.linalg.inv(M)

    def callback(matrix):
        return lambda _, r: jax.pure_callback(lambda r: matrix @ np.asarray(r), r, r)

    forward, backward = callback(inverse), callback(inverse.T)
    return lambda r: jax.custom_derivatives.linear_call(forward, backward, None, r)


def in_single_precision(x, theta):
    inverse = jnp.asarray(np.linalg.inv(M), np.float32)
    return lambda r: inverse @ r.astype(np.float32)


# Older JAX transposes no scan without a carry; the error then names what to write instead.
SCAN = pytest.param(with_scan, marks=pytest.mark.skipif(jax.__version_info__ < (0, 8), reason=""))


@pytest.mark.parametrize("preconditioner", [SCAN, with_own_transpose, in_single_precision])
def test_many_ways_to_write_a_linear_function(preconditioner):
    problem, _, theta, x, grad = case("root")
    rule = rule_with(preconditioner, num_steps=4)
    estimate, _ = bx.hypergradient(problem, jnp.asarray(x), theta, rule=rule)
    np.testing.assert_allclose(estimate.grad, grad, rtol=1e-5)


def test_trees():
    problem = bx.Bilevel(
        bx.Root(lambda x, t: {"a": M @ x["a"] - C @ t}),
        lambda x, t: 0.5 * jnp.sum((x["a"] - 1) ** 2),
    )
    _, _, theta, x, grad = case("root")
    estimate, _ = bx.hypergradient(problem, {"a": jnp.asarray(x)}, theta, rule=rule_with(with_tree))
    np.testing.assert_allclose(estimate.grad, grad, rtol=1e-9)


NOT_LINEAR = {
    "a square": lambda r: r * r,
    "a sine": jnp.sin,
    "a callback": lambda r: jax.pure_callback(np.asarray, r, r),
    "a while loop": lambda r: jax.lax.while_loop(lambda z: jnp.sum(z) > 1e9, lambda z: 2 * z, r),
}


@pytest.mark.parametrize("fn", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_what_cannot_be_transposed_says_so(fn):
    problem, _, theta, x, _ = case("root")
    with pytest.raises(TypeError, match=r"transpose of the preconditioner.*linear_call"):
        bx.hypergradient(problem, jnp.asarray(x), theta, rule=rule_with(lambda x, t: fn))


def test_another_shape_is_named():
    problem, _, theta, x, _ = case("root")
    with pytest.raises(ValueError, match="must return what it is given"):
        bx.hypergradient(
            problem, jnp.asarray(x), theta, rule=rule_with(lambda x, t: lambda r: r[1:])
        )


@pytest.mark.parametrize("kind", ["callable", "operator"])
def test_our_solver_inside_lineax(kind):
    inverse = jnp.asarray(np.linalg.inv(M))
    matrix, b = jnp.asarray(M), jnp.asarray(C[:, 0])
    preconditioner = lx.MatrixLinearOperator(inverse)
    options = {"preconditioner": preconditioner if kind == "operator" else preconditioner.mv}

    def solve(b):
        operator = lx.MatrixLinearOperator(matrix)
        return lx.linear_solve(
            operator, b, bx.linear.GMRES(max_steps=2), options={**options, "y0": jnp.ones(SIZE)}
        ).value

    value, back = jax.jit(lambda b: (solve(b), jax.grad(lambda b: jnp.sum(solve(b) ** 2))(b)))(b)
    np.testing.assert_allclose(value, np.linalg.solve(M, b), rtol=1e-9)
    np.testing.assert_allclose(back, np.linalg.solve(M.T, 2 * np.asarray(value)), rtol=1e-9)


def test_conjugates():
    inverse = jnp.asarray(np.linalg.inv(M) + 1j)
    solver = bx.linear.GMRES()
    r = jnp.asarray(np.arange(SIZE) + 2j)
    state = solver.init(lx.MatrixLinearOperator(jnp.asarray(M)), {})
    for given_options in (
        {"preconditioner": lx.MatrixLinearOperator(inverse)},
        {"preconditioner": lambda r: inverse @ r, "y0": r},
    ):
        _, options = solver.conj(state, given_options)
        applied = options["preconditioner"]
        applied = applied.mv(r) if isinstance(applied, lx.AbstractLinearOperator) else applied(r)
        np.testing.assert_allclose(applied, np.asarray(inverse).conj() @ np.asarray(r))
