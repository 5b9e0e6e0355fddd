"""Every outcome of a solve, with a message that says what to do next."""

import equinox as eqx


class RESULTS(eqx.Enumeration):
    """The outcomes of an inner solve, an adjoint solve or a whole hypergradient.

    A hypergradient is right to the stated accuracy only if its result is
    `RESULTS.successful`. `RESULTS[result]` is the message; where several parts fail, the
    first in the order inner solve, adjoint solve, hypergradient is reported.
    """

    successful = ""
    inner_not_converged = (
        "The inner solve did not converge: x is not a solution of the inner problem, so "
        "an implicit hypergradient taken there belongs to no problem. Give the inner "
        "solver more steps, loosen its tolerance, start nearer to the solution, or, if it "
        "is stopped early on purpose, use Unrolled() or Implicit(inexact=True). A black box "
        "that stops on its objective leaves more than it says: take a more exact one, or say "
        "what is enough, bx.External(fn, rtol=1e-5)."
    )
    adjoint_not_converged = (
        "The adjoint system was not solved to its tolerance, or not for the variables of "
        "smaller scale. Raise max_steps of the linear solver, precondition it (bx.Jacobi() "
        "where variables differ in scale), loosen its rtol, or ask for a fixed number of "
        "steps (num_steps=...), whose residual is then reported and not flagged."
    )
    negative_curvature = (
        "Negative curvature was met: the Hessian of the inner objective is not positive "
        "definite at x, so x is not a strict minimum. If another point is meant, solve the "
        "inner problem better (more steps, another start, bx.NewtonCG(), which leaves saddles) "
        "or regularise it. If this stationary point is meant, a saddle, use "
        "rule=bx.Implicit(bx.MINRES(indefinite=True)). Unrolled() does not need a minimum. In a "
        "batch of problems pass throw=False, and leave out those whose estimate.result is not "
        "bx.RESULTS.successful."
    )
    singular = (
        "The adjoint system is singular and has no solution: the inner problem has many "
        "solutions. Use rule bx.MinimumNorm() for the response of smallest norm, or "
        "regularise the inner objective. If MinimumNorm itself says this, the solutions do "
        "not move smoothly with theta, and there is no hypergradient."
    )
    nonfinite = (
        "A NaN or an infinity appeared. Check the data and the two objectives at the "
        "starting point, and reduce step sizes; jax.config.update('jax_debug_nans', "
        "True) shows the operation."
    )
    not_smooth = (
        "The inner objective is not smooth at x: its gradient jumps there (an absolute value, a "
        "maximum, a hinge, relu), so that its zero does not define how x* moves with theta. "
        "Smooth the kink (jnp.sqrt(x**2 + eps), jax.nn.softplus), or state the problem as the "
        "fixed point of a proximal step, bx.FixedPoint, which is smooth away from changes of "
        "the support."
    )
    unbounded = (
        "The inner solve diverged: along its steps the inner objective falls without end, so "
        "that there is no minimum. Check its sign, regularise it (+ 1e-3 * jnp.sum(x**2)), or "
        "keep x in its domain."
    )
    stalled = (
        "The precision floor was reached before the tolerance: rounding errors of this "
        "dtype are larger than what was asked for. Use float64 "
        "(jax.config.update('jax_enable_x64', True)), loosen rtol, or improve the "
        "scaling of the problem."
    )
    not_improved = (
        "The run ended above its start. The best theta it has seen is returned or, where x was "
        "not solved for (a warm-started rule through few steps, inexact=True), so that the "
        "values do not judge theta alone, the last theta. Take smaller steps, optax.adam(1e-2) "
        "say, or bx.OuterLBFGS(), which takes back a step that does not help; bx.check(...) "
        "compares the hypergradient with differences."
    )
    inaccurate = (
        "The hypergradient is less accurate than asked for: its error estimate exceeds rtol. "
        "Loosen rtol, give an atol (near a stationary point no relative accuracy can be had), "
        "give the inner solver more steps, or improve the conditioning of the inner problem."
    )
    jumped = (
        "The inner solution jumped: it is far from where the tangent D x* predicted it, so "
        "that it belongs to another branch of solutions, or the step crossed a fold. Take "
        "smaller outer steps, or regularise the inner objective so that its minimum is unique."
    )
    exploding = (
        "The derivative of the inner steps explodes: on the way back through them the adjoint "
        "grew by many orders of magnitude, so that the exact derivative of the steps says "
        "nothing about a finite change of theta. Use bx.PersistentES(...) or "
        "bx.EvolutionStrategies(...), fewer inner steps, a smaller inner step size, "
        "bx.Truncated(...) or, if an adaptive optimiser such as Adam has converged, a larger "
        "eps_root."
    )
    burn_in = (
        "The derivative of the inner steps has not begun to converge (the curse of unrolling): "
        "its error still grows with the number of steps, although x converges. Take more "
        "inner steps or a smaller inner step size, start nearer to the solution (warm start), "
        "or use bx.Implicit(). If the problem stopped after these steps is the one you mean, "
        "bx.Unrolled() is exact for it."
    )
    path_dependent = (
        "x has converged, and its derivative through the steps has not: it is not that of the "
        "solution. Steps that learn from the way they came (quasi-Newton, nonlinear conjugate "
        "gradients, Polyak's step size) pass on the derivative of that way; others need more "
        "steps for the derivative than for x. Use bx.Implicit() or, to keep to a few steps, "
        "bx.KStep(...). If the derivative of these very steps is meant, it is exact: take it "
        "with throw=False."
    )
    diverged = (
        "The linear solver, or the series of steps of a K-step rule, diverged: its step size is "
        "too large for this system. Give a smaller step_size, leave it None (it is then "
        "measured; for a fixed point it is 1, which needs a contraction), let the inner solver "
        "take smaller steps, or use CG() or lx.GMRES(...)."
    )


def first_failure(*results: RESULTS) -> RESULTS:
    """The first of `results` that is not successful."""
    out = results[-1]
    for result in reversed(results[:-1]):
        out = RESULTS.where(result != RESULTS.successful, result, out)
    return out


class SolveError(RuntimeError):
    """Raised with `throw=True` where an outcome is not successful.

    `result` is the outcome, so that a program can tell them apart.
    """

    def __init__(self, message: str, result: RESULTS) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple:
        # An exception is rebuilt from `args`, of which the outcome is none.
        return type(self), (*self.args, self.result), self.__dict__
