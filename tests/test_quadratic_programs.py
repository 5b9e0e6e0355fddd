"""Quadratic programs: every solver of them, random ones against all active sets, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax._inner._default import as_inner_solver

TRIANGLE = bx.QP(
    Q=jnp.array([[2.0, 0.5], [0.5, 1.0]]),
    q=lambda t: -t["pull"],
    G=jnp.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]),
    h=lambda t: jnp.array([1.0, 0.0, 0.0]) * t["side"],
)
SOLVERS = {"qpax": bx.QPax, "clarabel": bx.Clarabel, "osqp": bx.OSQP}


@pytest.mark.parametrize("module", [None, *SOLVERS])
def test_every_solver_on_an_edge(module):
    if module is not None:
        pytest.importorskip(module)
    solver = None if module is None else SOLVERS[module]()
    theta = {"pull": jnp.array([1.5, 1.2]), "side": jnp.array(1.0)}
    problem = bx.Bilevel(TRIANGLE, lambda x, t: x[0] + 2 * x[1])
    found, _ = bx.hypergradient(problem, jnp.zeros(2), theta, inner_solver=solver)
    # The answer of another solver is made exact on the constraints that are active.
    np.testing.assert_allclose(found.x.x, [0.4, 0.6], rtol=1e-12)
    np.testing.assert_allclose(found.x.inequality, [0.4, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.grad["pull"], [-0.5, 0.5], rtol=1e-12)
    assert float(found.grad["side"]) == pytest.approx(1.75)


def test_a_linear_program_and_data():
    share = bx.QP(
        q=lambda t, d: -t * d["gain"],
        A=lambda t, d: d["ones"],
        b=lambda t, d: t,
        G=-jnp.eye(3),
        h=0.0,
        data={"gain": jnp.array([0.1, 0.3, 0.9]), "ones": jnp.ones((1, 3))},
    )
    x, moved = jax.jvp(
        lambda t: bx.argmin(share)(jnp.zeros(3), t), (jnp.array(2.0),), (jnp.array(1.0),)
    )
    np.testing.assert_allclose(x, [0, 0, 2], atol=1e-12)
    np.testing.assert_allclose(moved, [0, 0, 1], atol=1e-12)


SIZE, ROWS, KINDS, NUM = 4, 6, ("usual", "twice the same", "in one corner", "other units"), 250


def random_program(rng, kind):
    matrix, x = rng.normal(size=(SIZE, SIZE)), 0.5 * rng.normal(size=SIZE)
    unit = 10.0 ** rng.uniform(-4, 4) if kind == "other units" else 1.0
    A, G = rng.normal(size=(1, SIZE)), rng.normal(size=(ROWS, SIZE))
    h = G @ x + rng.uniform(0, 1, size=ROWS)
    if kind == "twice the same":
        G[1], h[1] = 2 * G[0], 2 * h[0]
    if kind == "in one corner":
        h[:2] = (G @ x)[:2]
    Q = matrix @ matrix.T + 10.0 ** rng.uniform(-3, 0) * np.eye(SIZE)
    q, c = rng.normal(size=SIZE), rng.normal(size=SIZE)
    return {"Q": unit * Q, "q": unit * q, "A": A, "b": A @ x, "G": G, "h": h, "c": c, "unit": unit}


def by_all_active_sets(at):
    """The gradient of c'x for q, and by how much the active set is the only one."""
    Q, q, A, b, G, h, c, unit = at.values()
    for k in range(SIZE):
        for chosen in itertools.combinations(range(ROWS), k):
            rows = np.vstack([A, G[list(chosen)]])
            zeros = np.zeros((len(rows), len(rows)))
            system = np.block([[Q / unit, rows.T], [rows, zeros]])
            if np.linalg.cond(system) > 1e10:
                continue
            both = np.linalg.solve(system, np.concatenate([-q / unit, b, h[list(chosen)]]))
            multipliers, slack = both[SIZE + 1 :], h - G @ both[:SIZE]
            if np.min(multipliers, initial=0) < -1e-9 or np.min(slack) < -1e-9:
                continue
            others = np.delete(slack, list(chosen))
            margin = min(np.min(multipliers, initial=1), np.min(others, initial=1))
            right = np.concatenate([c, np.zeros(len(rows))])
            return -np.linalg.solve(system, right)[:SIZE] / unit, margin
    raise AssertionError("no active set is optimal")


def test_random_programs_are_right_or_flagged():
    """One in four each: a constraint given twice, a corner where two meet, and other units."""
    rng = np.random.default_rng(7)
    programs = [random_program(rng, KINDS[i % len(KINDS)]) for i in range(NUM)]
    program = bx.QP(**{name: lambda t, name=name: t[name] for name in "QqAbGh"})
    problem = bx.Bilevel(program, lambda x, t: t["c"] @ x)

    def solve(theta):
        found, _ = bx.hypergradient(problem, jnp.zeros(SIZE), theta, throw=False)
        return found.grad["q"], found.result.index

    names = [*"QqAbGhc"]
    stacked = {name: jnp.stack([p[name] for p in programs]) for name in names}
    grads, results = jax.jit(jax.vmap(solve))(stacked)
    names = np.array(bx.RESULTS.names())[np.asarray(results)]
    for at, grad, name in zip(programs, np.asarray(grads), names, strict=True):
        exact, margin = by_all_active_sets(at)
        if name == "successful":
            # At a vertex the gradient is zero up to rounding.
            np.testing.assert_allclose(grad, exact, rtol=1e-4, atol=1e-8 / at["unit"])
        else:
            assert name in ("dependent_constraints", "at_kink")
            assert name == "dependent_constraints" or margin < 1e-5
    assert np.mean(names == "successful") > 0.9


def test_what_is_no_quadratic_program_is_refused():
    with pytest.raises(TypeError, match="needs an objective"):
        bx.QP(G=jnp.eye(2), h=0.0)
    with pytest.raises(TypeError, match="A and b together"):
        bx.QP(q=jnp.ones(2), A=jnp.ones((1, 2)))
    pytest.importorskip("clarabel")
    curved = bx.ConstrainedMinimum(
        lambda x, t: jnp.sum((x - t) ** 4), inequality=lambda x, t: x - 1.0
    )
    with pytest.raises(TypeError, match="quadratic objective and affine constraints"):
        bx.argmin(curved, bx.Clarabel())(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(TypeError, match="without inequalities"):
        bx.argmin(lambda x, t: jnp.sum((x - t) ** 2), bx.OSQP())(jnp.zeros(2), jnp.ones(2))


def test_the_default_by_size():
    few, many = (bx.PrimalDual(jnp.zeros(n), None, jnp.zeros(3)) for n in (2, 3_000))
    assert isinstance(as_inner_solver(None, TRIANGLE, few), bx.InteriorPoint)
    assert isinstance(as_inner_solver(None, TRIANGLE, many), bx.Clarabel)
