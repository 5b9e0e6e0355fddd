"""Linear systems `A v = b` given by products: `solver, matvec, b, v0 -> LinearSolution`."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Int, PyTree, Scalar

from .._as_written import OneLine
from .._results import RESULTS
from .._tree import largest_entry, tree_norm
from ._transposed import transposed


class LinearSolution(eqx.Module):
    """What a linear solver found.

    `residual` is `||b - A v|| / ||b||` (zero if `b` is zero). A solver returns its own
    idea of it; `verify` replaces it by the measured one.
    """

    value: PyTree[Array]
    residual: Scalar
    # what `residual` had to reach: None for a fixed number of steps, `unbounded` where a
    # system without a solution is solved in the least-squares sense
    tolerance: Scalar | None
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    result: RESULTS


class AbstractIterativeLinearSolver(OneLine, lx.AbstractLinearSolver):
    """A linear solver of ours, usable in `lineax.linear_solve` by anybody.

    Subclasses give `solve`; the rest is Lineax' interface. Pytrees in and out. In Lineax'
    `options`, `y0` is the initial guess and `preconditioner` an operator or a callable
    that approximates the inverse.
    """

    # "symmetric" or "symmetric positive definite", where the systems must be that.
    needs: ClassVar[str | None] = None

    def for_nonsymmetric(self) -> "AbstractIterativeLinearSolver":
        """The solver for systems without symmetry; refused where it needs one."""
        if self.needs is not None:
            refuse_nonsymmetric(f"bx.{type(self).__name__}", self.needs)
        return self

    @abc.abstractmethod
    def solve(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None = None,
        preconditioner: Callable[[PyTree], PyTree] | None = None,
    ) -> LinearSolution:
        """Solve `A v = b` from `v0`. Without `v0`, `A(0)` is never evaluated."""

    def start(self, b: PyTree[Array]) -> PyTree:
        """The state before the first system of a sequence; most solvers have none."""
        del b

    def resume(
        self,
        matvec: Callable[[PyTree], PyTree],
        b: PyTree[Array],
        v0: PyTree[Array] | None,
        preconditioner: Callable[[PyTree], PyTree] | None,
        state: PyTree,
    ) -> tuple[LinearSolution, PyTree]:
        """`solve` with what was learnt from the systems before, and the next state."""
        return self.solve(matvec, b, v0, preconditioner), state

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        del options
        if operator.in_size() != operator.out_size():
            raise ValueError(
                f"{type(self).__name__} solves square systems; got an operator from "
                f"{operator.in_size()} to {operator.out_size()} entries. Use lx.LSMR(...)."
            )
        return lx.linearise(operator)

    def compute(self, state: Any, vector: PyTree[Array], options: dict[str, Any]) -> Any:
        preconditioner = options.get("preconditioner")
        if isinstance(preconditioner, lx.AbstractLinearOperator):
            preconditioner = preconditioner.mv
        solution = self.solve(state.mv, vector, options.get("y0"), preconditioner)
        solution = verify(solution, vector, state.mv(solution.value))
        stats = {
            "num_steps": solution.num_steps,
            "num_products": solution.num_products,
            "residual": solution.residual,
            "result": solution.result,
        }
        return solution.value, _to_lineax(solution.result), stats

    def transpose(self, state: Any, options: dict[str, Any]) -> Any:
        # A guess of the solution of one system says nothing about that of the other.
        options = {key: value for key, value in options.items() if key != "y0"}
        preconditioner = options.get("preconditioner")
        if isinstance(preconditioner, lx.AbstractLinearOperator):
            options["preconditioner"] = preconditioner.transpose()
        elif preconditioner is not None:
            # The inverse of A takes what A returns.
            like = jtu.tree_map(lambda a: jnp.zeros(a.shape, a.dtype), state.out_structure())
            # As an operator: Lineax calls it in another trace than this one.
            turned = transposed(preconditioner, like)
            options["preconditioner"] = lx.FunctionLinearOperator(turned, state.in_structure())
        return state.transpose(), options

    def conj(self, state: Any, options: dict[str, Any]) -> Any:
        options = dict(options)
        preconditioner = options.get("preconditioner")
        if isinstance(preconditioner, lx.AbstractLinearOperator):
            options["preconditioner"] = lx.conj(preconditioner)
        elif preconditioner is not None:
            options["preconditioner"] = lambda r: _conj(preconditioner(_conj(r)))
        if options.get("y0") is not None:
            options["y0"] = _conj(options["y0"])
        return lx.conj(state), options

    def assume_full_rank(self) -> bool:
        return True


class AbstractDirectLinearSolver(AbstractIterativeLinearSolver):
    """A linear solver that forms the matrix: with the factors it sees whether x is a solution."""

    @abc.abstractmethod
    def factorise(self, matvec: Callable[[PyTree], PyTree], like: PyTree[Array]) -> Any:
        """What all systems with this matrix share; `like` is of the shape of a solution."""


def verify(solution: LinearSolution, b: PyTree[Array], product: PyTree[Array]) -> LinearSolution:
    """`solution` with its residual measured from `product`, which is `A v`.

    A solver that claims success beyond what is measured has met the precision floor: a
    recursive residual keeps falling where the true one cannot. Twice the tolerance is
    granted, for the rounding of the measurement itself.
    """
    # Divided by the largest entry: squares under- and overflow in float32.
    scale = largest_entry(b)
    scale = jnp.where(scale > 0, scale, 1)
    norm_b = tree_norm(jtu.tree_map(lambda x: x / scale, b))
    error = tree_norm(jtu.tree_map(lambda x, y: (x - y) / scale, b, product))
    residual = error / jnp.where(norm_b > 0, norm_b, 1)
    # What is not finite in b, v or A v is not finite here; a pass over each would only
    # take longer to compile.
    finite = jnp.isfinite(residual)
    result = solution.result
    if solution.tolerance is not None:
        is_missed = ~(0.5 * residual <= solution.tolerance)
        is_missed = (result == RESULTS.successful) & is_missed
        result = RESULTS.where(is_missed, RESULTS.stalled, result)
    result = RESULTS.where(finite, result, RESULTS.nonfinite)
    num_products = solution.num_products + 1
    return eqx.tree_at(
        lambda s: (s.residual, s.result, s.num_products),
        solution,
        (residual, result, num_products),
    )


def _conj(tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(jnp.conj, tree)


def _to_lineax(result: RESULTS) -> Any:
    """The nearest of Lineax' outcomes; the exact one is in `stats["result"]`."""
    out = lx.RESULTS.successful
    for ours, theirs in (
        (RESULTS.adjoint_not_converged, lx.RESULTS.max_steps_reached),
        (RESULTS.negative_curvature, lx.RESULTS.breakdown),
        (RESULTS.singular, lx.RESULTS.singular),
        (RESULTS.stalled, lx.RESULTS.stagnation),
        (RESULTS.diverged, lx.RESULTS.breakdown),
        (RESULTS.nonfinite, lx.RESULTS.nonfinite_input),
    ):
        out = lx.RESULTS.where(result == ours, theirs, out)
    return out


def refuse_nonsymmetric(name: str, needed: str) -> NoReturn:
    """Say that a solver is for other systems."""
    raise ValueError(
        f"{name} needs a {needed} system, but the derivative of a Root or FixedPoint condition "
        "is not symmetric. Use GMRES(), lx.BiCGStab(...) or, with few variables, Direct()."
    )
