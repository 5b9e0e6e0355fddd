"""Every outcome of a solve, with a message that says what to do next."""

import difflib
from typing import Any

import equinox as eqx
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class _Outcome:
    """An attribute of `RESULTS`: one outcome, by what it says."""

    outcome: "RESULTS"  # made when all are known

    def __init__(self, message: str) -> None:
        self.message = message

    def __get__(self, instance: object, owner: type) -> "RESULTS":
        return self.outcome


class _Outcomes(type(eqx.Module)):
    def __getitem__(cls, result: "RESULTS") -> str:
        if not isinstance(result, RESULTS):
            raise TypeError(f"RESULTS[result] takes an outcome; got {type(result).__name__}.")
        if result.is_traced():
            return "traced"
        return str(_MESSAGES[np.asarray(result.index)])


class RESULTS(eqx.Module, metaclass=_Outcomes):
    """The outcomes of an inner solve, an adjoint solve or a whole hypergradient.

    A hypergradient is right to the stated accuracy only if its result is
    `RESULTS.successful`. Where several parts fail, the first in the order inner solve,
    adjoint solve, hypergradient is reported.

    `print(result)` shows the name of an outcome and what to do; `RESULTS[result]` is the
    latter alone, empty for `successful`. `result == RESULTS.stalled` and
    `result == "stalled"` are arrays of booleans, one for each problem of a batch; a name
    that no outcome has is a `ValueError`. `RESULTS.where(is_late, a, b)` chooses as
    `jnp.where` does, and `RESULTS.names()` lists all.
    """

    index: Int[Array | np.ndarray, "..."]

    def __init__(self, index: Int[Array | np.ndarray, "..."]) -> None:
        self.index = index

    successful = _Outcome("")
    inner_not_converged = _Outcome(
        "The inner solve did not converge: x is not a solution of the inner problem, so "
        "an implicit hypergradient taken there belongs to no problem. Give the inner "
        "solver more steps, loosen its tolerance, start nearer to the solution, or, if it "
        "is stopped early on purpose, use Unrolled() or Implicit(inexact=True). Where "
        "inner_residual is below inner_tolerance, the Newton step from x is too long: x is "
        "off in a soft direction or in a small variable; tighten the solver's rtol. A black box "
        "that stops on its objective leaves more than it says: take a more exact one, or say "
        "what is enough, bx.External(fn, rtol=1e-5)."
    )
    adjoint_not_converged = _Outcome(
        "The adjoint system was not solved to its tolerance, or not for the variables of "
        "smaller scale. Raise max_steps of the linear solver, precondition it "
        "(bx.precondition.Jacobi() where variables differ in scale), loosen its rtol, or ask for "
        "a fixed number of steps (num_steps=...), whose residual is then reported and not flagged."
    )
    negative_curvature = _Outcome(
        "Negative curvature was met: the Hessian of the inner objective is not positive "
        "definite at x, so x is not a strict minimum. If another point is meant, solve the "
        "inner problem better (more steps, another start, bx.NewtonCG(), which leaves saddles) "
        "or regularise it. If this stationary point is meant, a saddle, use "
        "rule=bx.Implicit(bx.linear.MINRES(indefinite=True)). Unrolled() needs no minimum. In a "
        "batch of problems pass throw=False, and leave out those whose estimate.result is not "
        "bx.RESULTS.successful."
    )
    singular = _Outcome(
        "The adjoint system is singular and has no solution: the inner problem has many "
        "solutions. Use rule bx.MinimumNorm() for the response of smallest norm, or "
        "regularise the inner objective. If MinimumNorm itself says this, the solutions do "
        "not move smoothly with theta, and there is no hypergradient."
    )
    nonfinite = _Outcome(
        "A NaN or an infinity appeared. Check the data and the two objectives at the "
        "starting point, and reduce step sizes; jax.config.update('jax_debug_nans', "
        "True) shows the operation."
    )
    not_smooth = _Outcome(
        "The inner objective is not smooth at x: its gradient jumps there (an absolute value, a "
        "maximum, a hinge, relu), so that its zero does not define how x* moves with theta. "
        "Smooth the kink (jnp.sqrt(x**2 + eps), jax.nn.softplus), or give a penalty as such, "
        "bx.ProximalMinimum(fn, bx.prox.L1(...)), whose derivative is that of its support."
    )
    at_kink = _Outcome(
        "The inner solution is at a kink: an entry that is held (a coefficient of zero, a bound, "
        "an inactive constraint) is about to be let go, or one that is free about to be held, and "
        "the error of x decides which. The derivative is one-sided there. Tighten the inner "
        "solver's rtol; if it stays, step across: the hypergradient at a slightly different theta "
        "is defined, and an optimiser that tolerates a failed evaluation goes on by itself."
    )
    support_not_identified = _Outcome(
        "The inner solve ended while its support (the entries that are not held at zero or at a "
        "bound) was still changing, so that x lies on no piece whose derivative is that of the "
        "solution. Give the inner solver more steps or a tighter rtol."
    )
    empty_support = _Outcome(
        "The penalty has left no entry of x: the hypergradient is zero, and does not say that a "
        "smaller strength would be no better. Start from a smaller strength (for a lasso a tenth "
        "of the largest |d_j fn| at x = 0), and bound it from above."
    )
    dependent_constraints = _Outcome(
        "The active constraints are dependent at x (too many of them meet there, or two say the "
        "same): their multipliers are not single numbers, and x need not move smoothly. Leave out "
        "constraints that follow from others, or move theta off the degenerate point."
    )
    infeasible = _Outcome(
        "The constraints contradict each other near x: no small change of x violates them less. "
        "Check their signs (inequality <= 0), loosen them, or start elsewhere."
    )
    unbounded = _Outcome(
        "The inner solve diverged: along its steps the inner objective falls without end, so "
        "that there is no minimum. Check its sign, regularise it (+ 1e-3 * jnp.sum(x**2)), or "
        "keep x in its domain."
    )
    stalled = _Outcome(
        "The precision floor was reached before the tolerance: rounding errors of this "
        "dtype are larger than what was asked for. Use float64 "
        "(jax.config.update('jax_enable_x64', True)), loosen rtol, or improve the "
        "scaling of the problem."
    )
    not_improved = _Outcome(
        "The run ended above its start. The best theta it has seen is returned or, where x was "
        "not solved for (a warm-started rule through few steps, inexact=True), so that the "
        "values do not judge theta alone, the last theta. Take smaller steps, optax.adam(1e-2) "
        "say, or bx.OuterLBFGS(), which takes back a step that does not help; bx.check(...) "
        "compares the hypergradient with differences."
    )
    inaccurate = _Outcome(
        "The hypergradient is less accurate than asked for: its error estimate exceeds rtol. "
        "Loosen rtol, give an atol (near a stationary point no relative accuracy can be had), "
        "give the inner solver more steps, or improve the conditioning of the inner problem."
    )
    jumped = _Outcome(
        "The inner solution jumped: it is far from where the tangent D x* predicted it, so "
        "that it belongs to another branch of solutions, or the step crossed a fold. Take "
        "smaller outer steps, or regularise the inner objective so that its minimum is unique."
    )
    exploding = _Outcome(
        "The derivative of the inner steps explodes: on the way back through them the adjoint "
        "grew by many orders of magnitude, so that the exact derivative of the steps says "
        "nothing about a finite change of theta. Use bx.PersistentES(...) or "
        "bx.EvolutionStrategies(...), fewer inner steps, a smaller inner step size, "
        "bx.Truncated(...) or, if an adaptive optimiser such as Adam has converged, a larger "
        "eps_root."
    )
    burn_in = _Outcome(
        "The derivative of the inner steps has not begun to converge (the curse of unrolling): "
        "its error still grows with the number of steps, although x converges. Take more "
        "inner steps or a smaller inner step size, start nearer to the solution (warm start), "
        "or use bx.Implicit(). If the problem stopped after these steps is the one you mean, "
        "bx.Unrolled() is exact for it."
    )
    path_dependent = _Outcome(
        "x has converged, and its derivative through the steps has not: it is not that of the "
        "solution. Steps that learn from the way they came (quasi-Newton, nonlinear conjugate "
        "gradients, Polyak's step size) pass on the derivative of that way; others need more "
        "steps for the derivative than for x. Use bx.Implicit() or, to keep to a few steps, "
        "bx.KStep(...). If the derivative of these very steps is meant, it is exact: "
        "bx.hypergradient(..., throw=False) gives it."
    )
    diverged = _Outcome(
        "The linear solver, or the series of steps of a K-step rule, diverged: its step size is "
        "too large for this system. Give a smaller step_size, leave it None (it is then "
        "measured; for a fixed point it is 1, which needs a contraction), let the inner solver "
        "take smaller steps, or use CG() or lx.GMRES(...)."
    )

    @staticmethod
    def names() -> list[str]:
        """The names of all outcomes."""
        return [str(name) for name in _NAMES]

    @staticmethod
    def messages() -> list[str]:
        """What they say, in the order of `names`."""
        return [str(message) for message in _MESSAGES]

    @staticmethod
    def where(is_first: Bool[Array, "..."], first: "RESULTS", second: "RESULTS") -> "RESULTS":
        """`first` where `is_first` holds, else `second`."""
        if first.index is second.index:
            return first
        with jax.ensure_compile_time_eval():
            return RESULTS(jnp.where(is_first, first.index, second.index))

    def is_traced(self) -> bool:
        """Whether the outcome is not known yet, inside a transformation of JAX."""
        return isinstance(self.index, jax.core.Tracer)

    @property
    def name(self) -> str:
        """The name; of a batch, all of them."""
        return "traced" if self.is_traced() else str(_NAMES[np.asarray(self.index)])

    def __eq__(self, other: object) -> Any:
        if isinstance(other, str):
            other = _named(other)
        if not isinstance(other, RESULTS):
            return NotImplemented
        with jax.ensure_compile_time_eval():
            return jnp.asarray(self.index == other.index)

    def __ne__(self, other: object) -> Any:
        is_equal = self.__eq__(other)
        if is_equal is NotImplemented:
            return is_equal
        with jax.ensure_compile_time_eval():
            return ~is_equal

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        if self.is_traced() or np.ndim(self.index) > 0:
            return self.name
        message = RESULTS[self]
        return f"{self.name}: {message}" if message else self.name


_ALL = {name: value for name, value in vars(RESULTS).items() if isinstance(value, _Outcome)}
_NAMES = np.array(list(_ALL))
_MESSAGES = np.array([outcome.message for outcome in _ALL.values()])
for _index, _outcome in enumerate(_ALL.values()):
    _outcome.outcome = RESULTS(np.asarray(_index, np.int32))


def _named(name: str) -> RESULTS:
    if name not in _ALL:
        near = difflib.get_close_matches(name, _ALL, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No outcome is named {name!r}.{hint} There are: {', '.join(_ALL)}.")
    return getattr(RESULTS, name)


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
