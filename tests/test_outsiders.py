"""What is defined elsewhere works wherever one of bilevax does, or is refused by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import extend

MATRIX = jnp.array([[3.0, 1.0, 0.0], [0.5, 2.0, 0.3], [0.0, -0.4, 2.5]])
TARGET = jnp.array([1.0, -1.0, 0.5])
SYMMETRIC = MATRIX + MATRIX.T
X0, THETA = jnp.zeros(3), jnp.array([0.7, -0.2])
SIDE = jnp.array([[1.0, 0.0], [0.5, 1.0], [-1.0, 2.0]])


def outer(x, theta):
    return 0.5 * jnp.sum((x - TARGET) ** 2) + 0.1 * jnp.sum(theta**2)


def exact(matrix, side=SIDE):
    """Of `matrix x = side theta`."""
    x = jnp.linalg.solve(matrix, side @ THETA)
    return 0.2 * THETA + side.T @ jnp.linalg.solve(matrix.T, x - TARGET)


# --- a condition


class Balance(extend.AbstractCondition):
    """`supply(x) = demand(theta)`: two functions where ours have one, no objective, no map."""

    fn: Callable
    demand: Callable
    data: Any = None
    is_symmetric: ClassVar[bool] = False

    def residual(self, x, theta):
        return self.fn(x, theta) - self.demand(theta)


BALANCE = bx.Bilevel(Balance(lambda x, _: MATRIX @ x, lambda theta: SIDE @ theta), outer)
RULES = {
    "Implicit": (bx.Implicit(), 1e-9),
    "GMRES": (bx.Implicit(bx.linear.GMRES(rtol=1e-12)), 1e-9),
    "error estimate": (bx.Implicit(error_estimate=True), 1e-9),
    "MinimumNorm": (bx.MinimumNorm(), 1e-9),
    "KStep": (bx.KStep(400, step_size=0.1), 1e-7),
    "Unrolled": (bx.Unrolled(), 1e-9),
    "ForwardMode": (bx.ForwardMode(), 1e-9),
}


@pytest.mark.parametrize("name", RULES)
def test_a_condition(name):
    rule, bound = RULES[name]
    solver = None if "Mode" not in name and name != "Unrolled" else bx.NewtonCG(rtol=1e-12)
    estimate, _ = bx.hypergradient(BALANCE, X0, THETA, inner_solver=solver, rule=rule)
    np.testing.assert_allclose(estimate.grad, exact(MATRIX), rtol=bound)


def test_a_condition_is_differentiated_solved_and_diagnosed():
    x_star = bx.argmin(BALANCE.inner)
    found = jax.jit(jax.jacrev(lambda theta: x_star(X0, theta)))(THETA)
    np.testing.assert_allclose(found, jnp.linalg.solve(MATRIX, SIDE), rtol=1e-9)
    solution = bx.solve(BALANCE, X0, THETA, num_steps=2, progress=False)
    assert not solution.stats["num_flagged"]
    assert "Balance" in str(bx.check(BALANCE, solution.x, THETA, verbose=False))


@pytest.mark.parametrize(
    ("rule", "solver", "message"),
    [
        (bx.JacobianFree(), None, "JacobianFree"),
        (bx.Implicit(bx.linear.CG()), None, "CG needs a symmetric"),
        (bx.Unrolled(), bx.Descent(optax.sgd(0.1), num_steps=3), "Balance"),
        (bx.SAMA(), bx.Descent(optax.sgd(0.1), num_steps=3), "Balance"),
    ],
)
def test_what_takes_a_minimum_refuses_a_condition_that_is_none(rule, solver, message):
    with pytest.raises((TypeError, ValueError), match=message):
        bx.hypergradient(BALANCE, X0, THETA, inner_solver=solver, rule=rule)


# --- a condition of more unknowns, and one of more functions


class Constrained(extend.AbstractCondition):
    """`min fn(x, theta)` where `constraint(x, theta) = 0`: unknown are x and the multipliers."""

    fn: Callable
    constraint: Callable
    data: Any = None
    is_symmetric: ClassVar[bool] = False  # it is, but not definite

    def unknown(self, x0, theta):
        if isinstance(x0, tuple):
            return x0
        value = eqx.filter_eval_shape(self.constraint, x0, theta)
        return x0, jnp.zeros(value.shape, value.dtype)

    def primal(self, unknown):
        return unknown[0]

    def residual(self, x, theta):
        def lagrangian(x, multipliers):
            return self.fn(x, theta) + multipliers @ self.constraint(x, theta)

        return jax.grad(lagrangian, (0, 1))(*x)

    def map_functions(self, wrap):
        return dataclasses.replace(self, fn=wrap(self.fn), constraint=wrap(self.constraint))


ROW = jnp.array([[1.0, 2.0, -1.0]])
NAMED = {"value": THETA, "name": "of no type that JAX knows"}


def constrained(scale):
    """`min x'Sx/2 - (side theta)'x` where `row x = scale theta_1`; theta has a name, too."""
    inner = Constrained(
        lambda x, theta: 0.5 * x @ (SYMMETRIC @ x) - x @ (SIDE @ theta["value"]),
        lambda x, theta: ROW @ x - scale * theta["value"][:1],
    )
    return bx.Bilevel(inner, lambda x, theta: outer(x, theta["value"]))


def exact_constrained(scale=2.0):
    matrix = jnp.block([[SYMMETRIC, ROW.T], [ROW, jnp.zeros((1, 1))]])
    side = jnp.concatenate([SIDE, jnp.array([[scale, 0.0]])])
    z = jnp.linalg.solve(matrix, side @ THETA)
    v = jnp.linalg.solve(matrix, jnp.append(z[:3] - TARGET, 0.0))
    return z, 0.2 * THETA + side.T @ v


@pytest.mark.parametrize("name", ["Implicit", "GMRES", "MinimumNorm", "error estimate", "Unrolled"])
def test_a_condition_with_multipliers(name):
    rule, bound = RULES[name]
    solver = bx.NewtonCG(rtol=1e-12) if name == "Unrolled" else None
    z, gradient = exact_constrained()
    problem = constrained(2.0)
    estimate, _ = bx.hypergradient(problem, X0, NAMED, inner_solver=solver, rule=rule)
    np.testing.assert_allclose(estimate.x[0], z[:3], rtol=1e-8)
    np.testing.assert_allclose(estimate.x[1], z[3:], rtol=1e-8)
    np.testing.assert_allclose(estimate.grad["value"], gradient, rtol=bound)
    if name == "Implicit":
        again, _ = bx.hypergradient(problem, estimate.x, NAMED)
        assert again.stats["num_inner_steps"] <= 1
        np.testing.assert_allclose(again.grad["value"], gradient, rtol=1e-8)


def test_what_is_made_of_a_condition_with_multipliers():
    x = bx.argmin(constrained(2.0).inner)(X0, NAMED)
    np.testing.assert_allclose(x, exact_constrained()[0][:3], rtol=1e-8)
    solution = bx.solve(constrained(2.0), X0, NAMED, num_steps=3, progress=False)
    assert not solution.stats["num_flagged"]
    assert [leaf.shape for leaf in solution.x] == [(3,), (1,)]

    # what the second function closes over is differentiated as what the first does
    def value(scale):
        return outer(bx.argmin(constrained(scale).inner)(X0, NAMED), THETA)

    ends = [outer(exact_constrained(2.0 + h)[0][:3], THETA) for h in (1e-6, -1e-6)]
    np.testing.assert_allclose(jax.jit(jax.grad(value))(2.0), (ends[0] - ends[1]) / 2e-6, rtol=1e-7)


# --- a condition whose adjoint system is not that of its residual


class Lasso(extend.AbstractCondition):
    """`min fn(x, theta) + strength(x, theta) |x|_1`, by proximal steps of length `step`."""

    fn: Callable
    strength: Callable
    step: float = 0.15
    data: Any = None
    is_symmetric: ClassVar[bool] = True  # on the support

    @property
    def iteration(self):
        return self.proximal_step

    def proximal_step(self, x, theta):
        moved = x - self.step * jax.grad(self.fn)(x, theta)
        threshold = self.step * self.strength(x, theta)
        return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0)

    def residual(self, x, theta):
        return x - self.proximal_step(x, theta)

    def equation_at(self, x, theta):
        support, signs = x != 0, jnp.sign(x)

        def on_support(x, theta):
            kept = jnp.where(support, x, 0)
            gradient = jax.grad(self.fn)(kept, theta) + self.strength(kept, theta) * signs
            return jnp.where(support, gradient, x)

        return on_support

    def map_functions(self, wrap):
        return dataclasses.replace(self, fn=wrap(self.fn), strength=wrap(self.strength))


PULL = np.array([2.0, 0.3, -1.5])
LASSO = bx.Bilevel(
    Lasso(
        lambda x, theta: 0.5 * x @ (SYMMETRIC @ x) - x @ PULL,
        lambda x, theta: jnp.exp(theta[0]) + 0 * theta[1],
    ),
    outer,
)
LASSO_RULES = {
    "Implicit": bx.Implicit(),
    "CG": bx.Implicit(bx.linear.CG(rtol=1e-12)),
    "Jacobi": bx.Implicit(bx.linear.CG(rtol=1e-12), preconditioner=bx.precondition.Jacobi()),
    "MinimumNorm": bx.MinimumNorm(),
    "GMRES": bx.Implicit(bx.linear.GMRES(rtol=1e-12)),
}


def exact_lasso(theta):
    """The support is that of the first and the last entry."""
    kept = [0, 2]
    matrix = np.asarray(SYMMETRIC)[np.ix_(kept, kept)]
    strength, signs = np.exp(float(theta[0])), np.array([1.0, -1.0])
    x = np.zeros(3)
    x[kept] = np.linalg.solve(matrix, PULL[kept] - strength * signs)
    v = np.linalg.solve(matrix, x[kept] - np.asarray(TARGET)[kept])
    gradient = np.asarray(SYMMETRIC) @ x - PULL
    assert np.all(np.sign(x[kept]) == signs) and abs(gradient[1]) < strength
    return x, 0.2 * np.asarray(theta) - np.array([strength * signs @ v, 0.0])


@pytest.mark.parametrize("name", LASSO_RULES)
def test_a_condition_on_a_support(name):
    theta = jnp.array([-1.0, 0.3])
    x, gradient = exact_lasso(theta)
    estimate, _ = bx.hypergradient(LASSO, X0, theta, rule=LASSO_RULES[name])
    np.testing.assert_allclose(estimate.x, x, atol=1e-6)
    np.testing.assert_allclose(estimate.grad, gradient, rtol=1e-5)
    x_star = bx.argmin(LASSO.inner, rule=LASSO_RULES[name])
    found = jax.jit(jax.grad(lambda theta: outer(x_star(X0, theta), theta)))(theta)
    np.testing.assert_allclose(found, gradient, rtol=1e-5)


# --- an inner solver and a linear solver


class Exact(extend.AbstractInnerSolver):
    """Solves a linear equation in one go; has no steps."""

    def init(self, condition, x0, theta):
        return None

    def solve(self, condition, x0, theta, state):
        residual = condition.residual(x0, theta)
        jacobian = jax.jacfwd(condition.residual)(x0, theta)
        x = x0 - jnp.linalg.solve(jacobian, residual)
        counts = extend.Counts(gradients=1, hessian=x.size)
        return extend.measure(condition, x, x0, theta, 1e-10, 0.0, 1, counts), state


class Inverse(extend.AbstractIterativeLinearSolver):
    """Forms the matrix."""

    needs: ClassVar[str | None] = None

    def solve(self, matvec, b, v0=None, preconditioner=None):
        matrix = jax.vmap(matvec)(jnp.eye(b.size)).T
        value = jnp.linalg.solve(matrix, b)
        zero, size = jnp.zeros(()), jnp.asarray(b.size, jnp.int32)
        return extend.LinearSolution(value, zero, zero + 1e-8, size, size, bx.RESULTS.successful)


class ForDefinite(Inverse):
    needs: ClassVar[str | None] = "symmetric positive definite"


def test_solvers():
    rule = bx.Implicit(Inverse())
    estimate, _ = bx.hypergradient(BALANCE, X0, THETA, inner_solver=Exact(), rule=rule)
    np.testing.assert_allclose(estimate.grad, exact(MATRIX), rtol=1e-9)
    assert estimate.adjoint_residual < 1e-14  # measured, whatever the solver says
    method = bx.DoubleLoop(Exact(), rule)
    assert not bx.solve(BALANCE, X0, THETA, method, num_steps=2, progress=False).stats[
        "num_flagged"
    ]


def test_solvers_are_refused_by_name():
    with pytest.raises(ValueError, match="ForDefinite needs a symmetric positive definite system"):
        bx.hypergradient(BALANCE, X0, THETA, rule=bx.Implicit(ForDefinite()))
    with pytest.raises(TypeError, match="Exact"):
        bx.hypergradient(BALANCE, X0, THETA, inner_solver=Exact(), rule=bx.Unrolled())


# --- a rule: the skeleton of CONTRIBUTING.md


class Damped(extend.AbstractAtSolution):
    """`v = (A + damping I)^-1 b`, by its own means."""

    damping: float = 0.0

    def adjoint(self, query, solved, state):
        at = solved.at
        matrix = jax.vmap(at.at.adjoint)(jnp.eye(at.grad_x.size)).T
        v = jnp.linalg.solve(matrix + self.damping * jnp.eye(len(matrix)), at.grad_x)
        grad, product = at.hypergradient(v)
        left = jnp.linalg.norm(at.grad_x - product) / jnp.linalg.norm(at.grad_x)
        counts = extend.Counts(gradients=1, hessian=len(matrix), cross=1)
        return extend.Adjoint(grad, v, (), counts, 0, {"adjoint_residual": left})

    def attach(self, query, x, inner_state, throw, failed):
        return bx.Implicit(damping=self.damping).attach(query, x, inner_state, throw, failed)

    def attach_to_call(self, call):
        return bx.Implicit(damping=self.damping).attach_to_call(call)


RIDGE = bx.Bilevel(
    lambda x, theta: 0.5 * x @ (SYMMETRIC @ x) - x @ (SIDE @ theta),
    outer,
)


@pytest.mark.parametrize("problem", [BALANCE, RIDGE], ids=["Balance", "Minimum"])
def test_a_rule(problem):
    estimate, state = bx.hypergradient(problem, X0, THETA, rule=Damped())
    expected = exact(MATRIX if problem is BALANCE else SYMMETRIC)
    np.testing.assert_allclose(estimate.grad, expected, rtol=1e-8)
    assert estimate.result == bx.RESULTS.successful
    assert estimate.adjoint_tolerance is None
    again, _ = bx.hypergradient(problem, X0, THETA, rule=Damped(), state=state)
    np.testing.assert_allclose(again.grad, expected, rtol=1e-8)
    x_star = bx.argmin(problem.inner, rule=Damped())
    total = jax.jit(jax.grad(lambda theta: outer(x_star(X0, theta), theta)))(THETA)
    np.testing.assert_allclose(total, expected, rtol=1e-8)


def test_a_rule_in_a_run_and_what_is_refused():
    method = bx.DoubleLoop(hypergradient=Damped())
    solution = bx.solve(RIDGE, X0, THETA, method, num_steps=3, progress=False)
    assert not solution.stats["num_flagged"]
    assert "Damped" in str(bx.compare(RIDGE, X0, THETA, rules=[Damped()]))
    with pytest.raises(TypeError, match="Damped"):  # no derivative of its own estimate
        jax.grad(lambda t: bx.hypergradient(RIDGE, X0, t, rule=Damped(), throw=False)[0].value)(
            THETA
        )
    with pytest.raises(TypeError, match="Damped"):
        bx.jacobian(RIDGE, X0, THETA, rule=Damped())
    with pytest.raises(TypeError, match="Damped"):
        bx.solve(RIDGE, X0, THETA, bx.MAID(hypergradient=Damped()), num_steps=2, progress=False)


# --- an outer method


class SignDescent(extend.AbstractMethod):
    """Every entry of theta moves by the same length, which shrinks."""

    length: float = 0.3

    def query(self, problem, x0, theta):
        solver = extend.as_inner_solver(None, problem.inner, x0)
        return extend.Query(problem, solver, x0, theta)

    def init(self, problem, x0, theta):
        query = self.query(problem, x0, theta)
        return SignState(theta, query.start, bx.Implicit().init(query), jnp.zeros(()))

    def evaluate(self, problem, x0, state, is_last):
        query = self.query(problem, state.x, state.theta)
        estimate, warm = bx.Implicit().estimate(query, state.warm)
        new_state = SignState(state.theta, estimate.x, warm, state.count)
        return extend.Evaluation.of(estimate, state.theta, proposal=estimate.grad), new_state

    def step(self, problem, state, seen):
        length = self.length / (1 + state.count)
        theta = state.theta - length * jnp.sign(seen.proposal)
        return SignState(theta, state.x, state.warm, state.count + 1)


class SignState(eqx.Module):
    theta: Any
    x: Any
    warm: Any
    count: Any


def test_an_outer_method():
    calls = []
    solution = bx.solve(
        RIDGE, X0, THETA, SignDescent(), num_steps=6, callback=calls.append, progress=False
    )
    assert solution.history.value[-1] < solution.history.value[0]
    assert [call.num_steps for call in calls] == list(range(1, 7))
    moved = np.abs(np.diff([call.theta for call in calls], axis=0))
    np.testing.assert_allclose(moved, 0.3 / np.arange(1, 6)[:, None] * np.ones(2), rtol=1e-9)
    assert "SignDescent" in repr(SignDescent())
    with pytest.raises(ValueError, match="SignDescent"):  # it has no place for a rule
        bx.solve(RIDGE, X0, THETA, SignDescent(), rule=bx.Implicit(), progress=False)
