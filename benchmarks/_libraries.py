"""The same hypergradient in every library: `build(settings) -> program`.

A program is `(theta, x0, train, validation) -> (value, grad, x, stats)`, compiled by the
library or by `jax.jit`. Each library is imported where it is used, so that a fresh process
imports nothing else. The settings are two tolerances: the norm of the inner gradient, and
the residual of the adjoint system relative to its right-hand side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _common import has
from _logistic import inner, outer

MAX_STEPS = 500  # the default of JAXopt
# The objective is multiplied by this for Optimistix, whose tolerances on it are absolute: the
# solutions get more accurate. And Lineax' CG takes curvature below 100 d eps for a breakdown,
# whatever the scale of the Hessian: in float32 it would raise at 20,000 features.
FACTOR = 1e3


def bilevax(method: str, tolerance: float | None = None, rtol: float | None = None) -> Callable:
    """`None` is bilevax' own default."""
    import bilevax as bx

    solvers = {"NewtonCG": bx.NewtonCG, "LBFGS": bx.LBFGS}
    solver = None
    if method != "NewtonCG" or tolerance is not None:
        stop = {} if tolerance is None else {"rtol": 0.0, "atol": tolerance}
        solver = solvers[method](**stop)
    rule = None if rtol is None else bx.Implicit(bx.linear.CG(rtol=rtol))

    return _bilevax_program(inner_solver=solver, rule=rule)


def _bilevax_program(**options: Any) -> Callable:
    import bilevax as bx

    problems: dict[int, bx.Bilevel] = {}

    def program(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        # once, as a user does; the problem keeps the array, and so its id
        problem = problems.get(id(train[0])) or bx.Bilevel(inner, outer, train, validation)
        problems[id(train[0])] = problem
        estimate, _ = bx.hypergradient(problem, x0, theta, throw=False, **options)
        return estimate.value, estimate.grad, estimate.x, estimate

    return program


def jaxopt(method: str, tolerance: float, rtol: float) -> Callable:
    """`method`: GradientDescent, or LBFGS and its line search."""
    import jaxopt
    from jaxopt.linear_solve import solve_cg

    adjoint = partial(solve_cg, tol=rtol, maxiter=10_000)
    options = {"tol": tolerance, "maxiter": MAX_STEPS, "implicit_diff_solve": adjoint}
    if method == "GradientDescent":
        solver = jaxopt.GradientDescent(inner, **options)
    else:
        solver = jaxopt.LBFGS(inner, linesearch=method.split()[1], **options)

    def loss(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        x, state = solver.run(x0, theta, train)
        return outer(x, theta, validation), (x, state.iter_num)

    return _program(loss)


def optimistix(method: str, scale: float, tolerance: float, rtol: float) -> Callable:
    """`scale` is the size of an entry of the adjoint's right-hand side."""
    import lineax as lx
    import optimistix as optx

    # Both stop entry by entry: the minimiser on the step and the objective, which the second
    # tolerance suits better than a norm of the gradient; CG on the residual, where `atol` must
    # fit the right-hand side or a single zero in it would ask for all.
    del tolerance
    solver = getattr(optx, method)(rtol=rtol, atol=rtol)
    adjoint = optx.ImplicitAdjoint(lx.CG(rtol=rtol, atol=rtol * scale, max_steps=10_000))

    def loss(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        solution = optx.minimise(
            lambda x, args: FACTOR * inner(x, *args),
            solver,
            x0,
            args=(theta, train),
            adjoint=adjoint,
            max_steps=MAX_STEPS,
            throw=False,
            tags=frozenset({lx.positive_semidefinite_tag}),
        )
        x = solution.value
        return outer(x, theta, validation), (x, solution.stats["num_steps"])

    return _program(loss)


def _program(loss: Callable) -> Callable:
    @jax.jit
    def program(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, (x, num_steps)), grad = value_and_grad(theta, x0, train, validation)
        return value, grad, x, num_steps

    return program


def handwritten(tolerance: float, rtol: float) -> Callable:
    """Newton-CG and CG with analytic derivatives, for this problem only."""
    compiled = jax.jit(partial(handwritten_hypergradient, tolerance=tolerance, rtol=rtol))

    def program(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        value, grad, x, _, num_products = compiled(theta, x0, None, train, validation)
        return value, grad, x, num_products

    return program


def handwritten_hypergradient(
    theta: Any, x0: Any, v0: Any, train: Any, validation: Any, *, tolerance: float, rtol: float
) -> tuple:
    """Value, hypergradient, x, v and the number of Hessian products."""
    strength = jnp.exp(theta)
    x, weight, num_inner = _newton_cg(x0, strength, train, tolerance)
    value, grad, v, num_adjoint = _adjoint(x, weight, strength, v0, train, validation, rtol)
    return value, grad, x, v, num_inner + num_adjoint


def handwritten_adjoint(rtol: float) -> Callable:
    """The part after the inner solve: x0 is taken as the solution."""

    @jax.jit
    def program(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        strength = jnp.exp(theta)
        _, _, weight = _losses(x0, strength, train)
        value, grad, _, count = _adjoint(x0, weight, strength, None, train, validation, rtol)
        return value, grad, x0, count

    return program


def jaxopt_adjoint(rtol: float) -> Callable:
    """The same by JAXopt's `custom_root`."""
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

    solve = partial(solve_cg, tol=rtol, maxiter=10_000)
    given = custom_root(jax.grad(inner), solve=solve)(lambda x0, theta, train: x0)

    def loss(theta: Any, x0: Any, train: Any, validation: Any) -> tuple:
        x = given(x0, theta, train)
        return outer(x, theta, validation), (x, 0)

    return _program(loss)


def bilevax_adjoint(rtol: float | None = None) -> Callable:
    """The same by bilevax."""
    import bilevax as bx

    rule = bx.Implicit(None if rtol is None else bx.linear.CG(rtol=rtol), inexact=True)
    return _bilevax_program(inner_solver=bx.Given(), rule=rule)


def _losses(x: Any, strength: Any, data: Any) -> tuple:
    A, y = data
    margin = y * (A @ x)
    miss = jax.nn.sigmoid(-margin)
    value = jnp.mean(jnp.logaddexp(0.0, -margin)) + 0.5 * jnp.sum(strength * x * x)
    # (r @ A, not A.T @ r: on CPU the latter copies the transpose)
    gradient = -(miss * y) @ A / y.size + strength * x
    return value, gradient, miss * (1 - miss) / y.size


def _newton_cg(x0: Any, strength: Any, train: Any, tolerance: float) -> tuple:
    A, _ = train

    def body(state: tuple) -> tuple:
        x, value, gradient, weight, first, count = state
        norm = jnp.sqrt(gradient @ gradient)
        eta = jnp.minimum(0.1, jnp.sqrt(norm / first))
        goal = jnp.maximum(0.5 * tolerance, eta * norm)
        step, k = _cg(lambda p: (weight * (A @ p)) @ A + strength * p, -gradient, None, goal)

        def is_worse(trial: tuple) -> Any:
            new, length = trial
            return (new[0] > value + 1e-6 * jnp.abs(value)) & (length > 1e-6)

        def halve(trial: tuple) -> tuple:
            length = trial[1] / 2
            return _losses(x + length * step, strength, train), length

        new, length = jax.lax.while_loop(
            is_worse, halve, (_losses(x + step, strength, train), jnp.ones_like(value))
        )
        return x + length * step, *new, first, count + k

    value, gradient, weight = _losses(x0, strength, train)
    first = jnp.sqrt(gradient @ gradient)
    state = jax.lax.while_loop(
        lambda s: s[2] @ s[2] > tolerance**2,
        body,
        (x0, value, gradient, weight, first, jnp.asarray(0, jnp.int32)),
    )
    return state[0], state[3], state[5]


def _adjoint(
    x: Any, weight: Any, strength: Any, v0: Any, train: Any, validation: Any, rtol: float
) -> tuple:
    A, _ = train
    B, z = validation
    margin = z * (B @ x)
    b = -(jax.nn.sigmoid(-margin) * z) @ B / z.size
    goal = rtol * jnp.sqrt(b @ b)
    v, count = _cg(lambda p: (weight * (A @ p)) @ A + strength * p, b, v0, goal)
    return jnp.mean(jnp.logaddexp(0.0, -margin)), -strength * x * v, v, count


def _cg(product: Callable, b: Any, v0: Any, goal: Any) -> tuple:
    def body(state: tuple) -> tuple:
        v, r, p, rr, count = state
        q = product(p)
        alpha = rr / (p @ q)
        v, r = v + alpha * p, r - alpha * q
        new = r @ r
        return v, r, r + (new / rr) * p, new, count + 1

    r = b if v0 is None else b - product(v0)
    v = jnp.zeros_like(b) if v0 is None else v0
    count = jnp.asarray(0 if v0 is None else 1, jnp.int32)
    v, _, _, _, count = jax.lax.while_loop(lambda s: s[3] > goal**2, body, (v, r, r, r @ r, count))
    return v, count


def peers(scale: float = 1e-2) -> dict[str, Callable[[float, float], Callable]]:
    """Every peer that is installed, by name: `(tolerance, rtol) -> program`."""
    found: dict[str, Callable[[float, float], Callable]] = {
        "optimistix LBFGS": partial(optimistix, "LBFGS", scale),
        "optimistix BFGS": partial(optimistix, "BFGS", scale),
    }
    if has("jaxopt"):
        found["jaxopt LBFGS zoom"] = partial(jaxopt, "LBFGS zoom")
        found["jaxopt LBFGS backtracking"] = partial(jaxopt, "LBFGS backtracking")
        found["jaxopt GradientDescent"] = partial(jaxopt, "GradientDescent")
    return found
