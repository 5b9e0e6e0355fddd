"""Inner problems under equations and inequalities, against closed forms and other solvers."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import bilevax as bx

ROW, SEEN = jnp.array([1.0, 2.0, -1.0]), jnp.array([1.0, -1.0, 2.0])
EQUATION = bx.ConstrainedMinimum(
    lambda x, t: 0.5 * jnp.sum((x - t["target"]) ** 2),
    equality=lambda x, t: ROW @ x - t["side"],
)
MATRIX = jnp.array([[2.0, 0.5], [0.5, 1.0]])


def triangle(x, t):
    return jnp.concatenate([jnp.stack([x[0] + x[1] - t["side"]]), -x])


TRIANGLE = bx.ConstrainedMinimum(
    lambda x, t: 0.5 * x @ MATRIX @ x - t["pull"] @ x, inequality=triangle
)


def outcome(condition, outer, x0, theta, **options):
    return bx.hypergradient(bx.Bilevel(condition, outer), x0, theta, throw=False, **options)[0]


def at_pull(*pull):
    theta = {"pull": jnp.array(pull), "side": jnp.array(1.0)}
    return outcome(TRIANGLE, lambda x, t: x[0] + 2 * x[1], jnp.zeros(2), theta)


def test_an_equation():
    theta = {"target": jnp.array([0.3, -0.2, 0.9]), "side": jnp.array(0.5)}
    found = outcome(EQUATION, lambda x, t: SEEN @ x, jnp.zeros(3), theta)
    assert found.result == bx.RESULTS.successful
    np.testing.assert_allclose(found.x.x, [0.55, 0.3, 0.65], rtol=1e-12)
    assert float(found.x.equality) == pytest.approx(-0.25)
    np.testing.assert_allclose(found.grad["target"], [1.5, 0, 1.5], atol=1e-12)
    assert float(found.grad["side"]) == pytest.approx(-0.5)


def test_inequalities_on_an_edge_and_at_a_vertex():
    edge = at_pull(1.5, 1.2)
    assert edge.result == bx.RESULTS.successful
    np.testing.assert_allclose(edge.x.x, [0.4, 0.6], rtol=1e-9)
    np.testing.assert_allclose(edge.x.inequality, [0.4, 0, 0], atol=1e-9)
    np.testing.assert_allclose(edge.grad["pull"], [-0.5, 0.5], rtol=1e-9)
    assert float(edge.grad["side"]) == pytest.approx(1.75)
    vertex = at_pull(3.0, 0.8)
    assert vertex.result == bx.RESULTS.successful
    np.testing.assert_allclose(vertex.x.inequality, [1, 0, 0.7], atol=1e-9)
    np.testing.assert_allclose(vertex.grad["pull"], [0, 0], atol=1e-9)
    inside = at_pull(0.1, 0.1)
    np.testing.assert_allclose(inside.x.x, jnp.linalg.solve(MATRIX, jnp.array([0.1, 0.1])))
    # x = (1, 0) is the free minimum, and on the boundary
    assert at_pull(2.0, 0.5).result == bx.RESULTS.at_kink


def test_what_is_degenerate_has_an_outcome():
    def nearest(x, t):
        return 0.5 * jnp.sum((x - t) ** 2)

    for inequality, name in (
        (lambda x, t: jnp.stack([x[0], 1 - x[0]]), "infeasible"),
        (lambda x, t: jnp.stack([x[0] - 1, 2 * x[0] - 2]), "dependent_constraints"),
        (lambda x, t: jnp.stack([x[0] - 2]), "at_kink"),
    ):
        condition = bx.ConstrainedMinimum(nearest, inequality=inequality)
        found = outcome(condition, lambda x, t: jnp.sum(x), jnp.zeros(2), jnp.array(2.0))
        assert found.result == name


def test_derivatives_of_the_solution_map():
    theta = {"pull": jnp.array([1.5, 1.2]), "side": jnp.array(1.0)}
    solution = bx.argmin(TRIANGLE)
    np.testing.assert_allclose(solution(jnp.zeros(2), theta), [0.4, 0.6], rtol=1e-9)
    jacobian = jax.jacobian(lambda t: solution(jnp.zeros(2), t))(theta)
    np.testing.assert_allclose(jacobian["side"], [0.25, 0.75], rtol=1e-9)
    np.testing.assert_allclose(jacobian["pull"], [[0.5, -0.5], [-0.5, 0.5]], rtol=1e-9)

    def value(pull):
        return jnp.sum(solution(jnp.zeros(2), {**theta, "pull": pull}) ** 2)

    expected = 2 * jacobian["pull"].T @ jacobian["pull"]
    np.testing.assert_allclose(jax.hessian(value)(theta["pull"]), expected, atol=1e-9)


def test_multipliers_are_seen_if_asked_for():
    condition = bx.ConstrainedMinimum(
        EQUATION.fn, equality=EQUATION.equality, with_multipliers=True
    )
    theta = {"target": jnp.array([0.3, -0.2, 0.9]), "side": jnp.array(0.5)}
    # of the multiplier `(row' target - side) / row' row`
    found = outcome(condition, lambda u, t: u.equality, jnp.zeros(3), theta)
    assert float(found.grad["side"]) == pytest.approx(-1 / 6)
    np.testing.assert_allclose(found.grad["target"], ROW / 6, rtol=1e-9)


def test_a_run_starts_from_the_pair_it_found():
    theta = {"pull": jnp.array([1.5, 1.2]), "side": jnp.array(1.0)}
    problem = bx.Bilevel(TRIANGLE, lambda x, t: jnp.sum((x - 0.2) ** 2))
    solution = bx.solve(problem, jnp.zeros(2), theta, num_steps=3, progress=False)
    assert solution.stats["num_flagged"] == 0 and isinstance(solution.x, bx.PrimalDual)
    assert bx.check(problem, solution.x, solution.theta, verbose=False).ok


def test_a_solver_on_the_host_returns_a_pair():
    """SciPy's SLSQP gives x; the multipliers follow from it."""

    def solve(unknown, theta):
        pull, side = np.asarray(theta["pull"]), float(theta["side"])
        matrix, rows = np.asarray(MATRIX), np.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        limits = np.array([side, 0.0, 0.0])
        x = minimize(
            lambda x: 0.5 * x @ matrix @ x - pull @ x,
            np.asarray(unknown.x),
            jac=lambda x: matrix @ x - pull,
            constraints={"type": "ineq", "fun": lambda x: limits - rows @ x},
            method="SLSQP",
            options={"ftol": 1e-15},
        ).x
        active = limits - rows @ x < 1e-7
        multipliers = np.zeros(3)
        multipliers[active] = np.linalg.lstsq(rows[active].T, pull - matrix @ x)[0]
        return bx.PrimalDual(x, None, multipliers)

    theta = {"pull": jnp.array([1.5, 1.2]), "side": jnp.array(1.0)}
    found = outcome(
        TRIANGLE, lambda x, t: x[0] + 2 * x[1], jnp.zeros(2), theta, inner_solver=bx.External(solve)
    )
    assert found.result == bx.RESULTS.successful
    np.testing.assert_allclose(found.grad["pull"], [-0.5, 0.5], rtol=1e-5)


def random_program(matrix, pull, rows, limits, weights, theta):
    size = len(pull)
    condition = bx.ConstrainedMinimum(
        lambda x, t: 0.5 * x @ (matrix.T @ matrix + 0.1 * jnp.eye(size)) @ x - (pull + t) @ x,
        inequality=lambda x, t: rows @ x - limits,
    )
    found = outcome(condition, lambda x, t: weights @ x, jnp.zeros(size), theta)
    return found.result.index, found.grad, found.x


def system(matrix, rows, active):
    hessian = matrix.T @ matrix + 0.1 * np.eye(matrix.shape[1])
    return np.block([[hessian, rows[active].T], [rows[active], np.zeros((sum(active),) * 2)]])


def padded(side, active, limits=None):
    return np.append(side, np.zeros(sum(active)) if limits is None else limits[active])


def exact_solution(matrix, pull, rows, limits, _, theta, active):
    active = np.asarray(active)
    side = padded(pull + theta, active, limits)
    return np.linalg.lstsq(system(matrix, rows, active), side)[0][: len(pull)]


@pytest.mark.parametrize("kind", ["any", "weakly active"])
def test_random_quadratic_programs_are_right_or_flagged(kind):
    num, size, num_rows = 500, 6, 8
    rng = np.random.default_rng(len(kind))
    data = [
        rng.normal(size=(num, size, size)),
        3 * rng.normal(size=(num, size)),
        rng.normal(size=(num, num_rows, size)),
        rng.uniform(0, 1, size=(num, num_rows)),
        rng.normal(size=(num, size)),
        np.zeros((num, size)),
    ]
    batch = jax.jit(jax.vmap(random_program))
    if kind == "weakly active":  # limits that the solution without the first row meets, nearly
        without = [*data[:3], data[3].copy(), *data[4:]]
        without[3][:, 0] = 1e3
        pairs = batch(*map(jnp.asarray, without))[2]
        x = [exact_solution(*(a[i] for a in without), pairs.inequality[i] > 0) for i in range(num)]
        away = rng.choice([-1, 1], size=num) * 10.0 ** -rng.uniform(2, 14, size=num)
        data[3][:, 0] = np.einsum("ij,ij->i", data[2][:, 0], np.stack(x)) + away
    results, grads, pairs = batch(*map(jnp.asarray, data))
    names = np.array(bx.RESULTS.names())[np.asarray(results)]
    for i in np.flatnonzero(names == "successful"):
        matrix, _, rows, limits, weights, _ = (a[i] for a in data)
        x, multipliers = np.asarray(pairs.x[i]), np.asarray(pairs.inequality[i])
        assert np.max(rows @ x - limits) < 1e-6 and np.min(multipliers) > -1e-6
        active = multipliers > 0
        assert kind == "any" or active[0] == (away[i] < 0)
        exact = np.linalg.solve(system(matrix, rows, active), padded(weights, active))[:size]
        np.testing.assert_allclose(grads[i], exact, rtol=1e-4, atol=1e-4)
    counts = collections.Counter(names.tolist())
    assert counts["successful"] >= (0.97 if kind == "any" else 0.5) * num, counts


def test_a_controller_learns_its_weights():
    """Model-predictive control of a cart under bounds on its force, as a layer."""
    steps = 10
    A, B = jnp.array([[1.0, 0.1], [0.0, 1.0]]), jnp.array([0.005, 0.1])

    def states(forces, start):
        def step(state, force):
            state = A @ state + B * force
            return state, state

        return jax.lax.scan(step, start, forces)[1]

    def cost(forces, theta):
        path = states(forces, jnp.array([1.0, 0.0]))
        return jnp.sum(path[:, 0] ** 2) + jnp.exp(theta) * jnp.sum(forces**2)

    controller = bx.ConstrainedMinimum(
        cost, inequality=lambda forces, t: jnp.concatenate([forces - 2, -forces - 2])
    )

    def miss(theta):
        forces = bx.argmin(controller)(jnp.zeros(steps), theta)
        return jnp.sum(states(forces, jnp.array([1.0, 0.0]))[-1] ** 2)

    theta, h = jnp.array(-3.0), 1e-4
    forces = bx.argmin(controller)(jnp.zeros(steps), theta)
    assert np.sum(np.isclose(np.abs(forces), 2)) in range(1, steps)  # some bounds hold
    expected = (miss(theta + h) - miss(theta - h)) / (2 * h)
    assert float(jax.grad(miss)(theta)) == pytest.approx(float(expected), rel=1e-6)


def test_what_is_no_constraint_is_refused():
    with pytest.raises(TypeError, match="needs a constraint"):
        bx.ConstrainedMinimum(lambda x, t: jnp.sum(x**2))
    with pytest.raises(TypeError, match="inequality"):
        bx.ConstrainedMinimum(lambda x, t: jnp.sum(x**2), inequality=jnp.ones(2))
    smooth = bx.Bilevel(lambda x, t: jnp.sum((x - t) ** 2), lambda x, t: jnp.sum(x))
    with pytest.raises(TypeError, match="without inequalities"):
        bx.hypergradient(smooth, jnp.zeros(2), jnp.array(1.0), inner_solver=bx.InteriorPoint())
    with pytest.raises(ValueError, match="max_variables"):
        theta = {"pull": jnp.array([1.5, 1.2]), "side": jnp.array(1.0)}
        solver = bx.InteriorPoint(max_variables=3)
        bx.argmin(TRIANGLE, solver)(jnp.zeros(2), theta)


def test_a_saddle_along_the_constraints_is_flagged():
    """And what is bent down elsewhere only is not."""

    def saddle(x, t):
        return 0.5 * x[0] ** 2 - 0.5 * t["bend"] * x[1] ** 2 - jnp.sum(x)

    on_line = bx.ConstrainedMinimum(saddle, equality=lambda x, t: jnp.sum(x) - 1)
    in_view = bx.ConstrainedMinimum(
        saddle, equality=lambda x, t: jnp.sum(x) - 1, inequality=lambda x, t: x[:1] - 100
    )
    for condition in (on_line, in_view):
        problem = bx.Bilevel(condition, lambda x, t: jnp.sum(x**2))
        names = [
            bx.hypergradient(problem, jnp.zeros(2), {"bend": jnp.array(b)}, throw=False)[
                0
            ].result.name
            for b in (2.0, 0.2)
        ]
        assert names == ["negative_curvature", "successful"]


def test_a_temperature_on_the_simplex():
    """The softmax is the minimum of `-s'x + tau x'log x` where `sum(x) = 1`; closed form."""
    seen = jnp.array([0.3, -1.0, 0.5, 0.8])
    theta = {"s": jnp.array([1.0, 0.2, -0.5, 0.7]), "tau": jnp.array(0.6)}
    entropy = bx.ConstrainedMinimum(
        lambda x, t: -t["s"] @ x + t["tau"] * jnp.sum(x * jnp.log(x)),
        equality=lambda x, t: jnp.sum(x) - 1,
    )
    found = outcome(entropy, lambda x, t: seen @ x, jnp.full(4, 0.25), theta)
    assert found.result == bx.RESULTS.successful
    exact = jax.grad(lambda t: seen @ jax.nn.softmax(t["s"] / t["tau"]))(theta)
    np.testing.assert_allclose(found.x.x, jax.nn.softmax(theta["s"] / theta["tau"]), rtol=1e-9)
    np.testing.assert_allclose(found.grad["s"], exact["s"], rtol=1e-9)
    assert float(found.grad["tau"]) == pytest.approx(-0.216931451697, rel=1e-9)
    assert float(exact["tau"]) == pytest.approx(-0.216931451697, rel=1e-11)


def test_a_barrier_tends_to_its_constraint():
    """`theta x + x^2/2 - t log x`: closed form, and `max(-theta, 0)` as t goes to zero."""
    softened = bx.argmin(
        lambda x, t: t[0] * x + 0.5 * x**2 - t[1] * jnp.log(x), bx.NewtonCG(rtol=1e-12)
    )
    theta = jnp.array([0.3, 0.01])
    x, slope = jax.value_and_grad(lambda t: softened(jnp.array(0.1), t))(theta)
    assert float(x) == pytest.approx(0.0302775637732, rel=1e-9)
    np.testing.assert_allclose(slope, [-0.0839748528311, 2.773500981126], rtol=1e-8)
    hard = bx.argmin(
        bx.ConstrainedMinimum(lambda x, t: t * x + 0.5 * x**2, inequality=lambda x, t: -x)
    )
    for value, exact in ((0.3, (0.0, 0.0)), (-0.4, (0.4, -1.0))):
        found = jax.value_and_grad(lambda t: hard(jnp.array(0.1), t))(value)
        np.testing.assert_allclose(found, exact, atol=1e-9)
