"""A minimum under constraints as a quadratic program, and the solvers of those."""

import abc
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_tolerance
from .._jit import standard_promotion
from .._problem import AbstractCondition
from .._problem._fixed import is_fixed
from ._base import AbstractInnerSolver, Counts, InnerSolution, measure

# Of what these solvers stop on; the residual that counts is measured.
_TOLERANCE = 1e-10


class Matrices(NamedTuple):
    """`1/2 x'Qx + q'x` where `Ax = b` and `Gx <= h`."""

    Q: Float[Array, "n n"]
    q: Float[Array, " n"]
    A: Float[Array, "p n"]
    b: Float[Array, " p"]
    G: Float[Array, "m n"]
    h: Float[Array, " m"]


class _Sparse(NamedTuple):
    """The same for a solver on the host: NumPy arrays, and matrices of SciPy."""

    upper: Any  # of Q
    q: np.ndarray
    rows: Any  # of A, then of G
    b: np.ndarray
    h: np.ndarray


def matrices(condition: Any, x0: PyTree, theta: PyTree, name: str) -> Matrices:
    """Of a condition that is a quadratic program, by its derivatives; an error elsewhere."""
    x, back = ravel_pytree(x0.x)
    gradient = jax.grad(lambda x: condition(back(x), theta))

    def constraints(x: Array) -> tuple[Array, Array]:
        return condition.constraints(back(x), theta)

    hessian, derivatives = jax.jacfwd(gradient), jax.jacfwd(constraints)
    if not (is_fixed(hessian, x) and is_fixed(derivatives, x)):
        raise TypeError(
            f"`{name}` solves quadratic programs: a quadratic objective and affine constraints. "
            "The Hessian of the objective or the derivative of a constraint depends on x here. "
            "Take bx.InteriorPoint()."
        )
    zero = jnp.zeros_like(x)
    (equal, less), (A, G) = constraints(zero), derivatives(zero)
    return Matrices(hessian(zero), gradient(zero), A, -equal, G, -less)


def check_inequalities(condition: AbstractCondition, name: str) -> None:
    """Only of these has the unknown multipliers."""
    if not condition.has_inequalities:
        raise TypeError(
            f"`{name}` solves a bx.QP or bx.ConstrainedMinimum(..., inequality=...); the inner "
            f"problem is a {type(condition).__name__} without inequalities. Leave out the "
            "solver, or use bx.NewtonCG() or bx.LBFGS() for a minimum."
        )


class AbstractProgramSolver(AbstractInnerSolver):
    """A solver of quadratic programs that returns x with its multipliers."""

    rtol: eqx.AbstractVar[float | Scalar | None]
    atol: eqx.AbstractVar[float | Scalar]
    settings: eqx.AbstractVar[dict[str, Any] | None]

    @abc.abstractmethod
    def run(self, program: Matrices) -> tuple[Array, Array, Array]:
        """X and the multipliers of the equations and of the inequalities."""

    def __check_init__(self) -> None:
        check_tolerance(type(self).__name__, rtol=self.rtol, atol=self.atol)

    def init(self, condition: AbstractCondition, x0: PyTree, theta: PyTree) -> PyTree:
        del x0, theta
        check_inequalities(condition, type(self).__name__)

    def with_rtol(self, rtol: Scalar) -> "AbstractProgramSolver":
        return eqx.tree_at(lambda s: s.rtol, self, rtol, is_leaf=lambda leaf: leaf is None)

    def solve(
        self, condition: AbstractCondition, x0: PyTree, theta: PyTree, state: PyTree
    ) -> tuple[InnerSolution, PyTree]:
        del state
        program = matrices(condition, x0, theta, type(self).__name__)
        x = ravel_pytree(x0)[1](jnp.concatenate(self.run(program)))
        x = condition.refined(x, theta)
        counts = Counts(gradients=1, hessian=program.q.size)
        return measure(condition, x, x0, theta, self.rtol, self.atol, 1, counts), None


class QPax(AbstractProgramSolver):
    """qpax, a primal-dual interior point method in JAX, for `bx.QP`.

    **Arguments:**

    - `rtol`, `atol`: what the residual of its answer must meet; see `bx.InteriorPoint`.
    - `settings`: of `qpax.solve_qp`, such as `{"solver_tol": 1e-6}`.

    Needs `pip install "bilevax[qp]"`.

    **Cost:** the matrices, and what qpax takes.

    **Exact when** the program is convex and qpax has converged.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.QPax()
        ```

    Reference: Tracy and Manchester, "On the differentiability of the primal-dual interior-point
    method", 2024.
    """

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    settings: dict[str, Any] | None = eqx.field(default=None, static=True)

    def run(self, program: Matrices) -> tuple[Array, Array, Array]:
        settings = {"solver_tol": _TOLERANCE} | (self.settings or {})
        with standard_promotion(), jax.numpy_rank_promotion("allow"):
            x, _, mu, nu, *_ = _imported("qpax", "QPax").solve_qp(*program, **settings)
        return x, nu, mu


class Clarabel(AbstractProgramSolver):
    """Clarabel, an interior point method for sparse quadratic programs, on the host.

    The default for a `bx.QP` of more than 2,000 variables and multipliers. Inside `jax.jit` it
    is a callback; a batch is solved one by one.

    **Arguments:**

    - `rtol`, `atol`: what the residual of its answer must meet; see `bx.InteriorPoint`.
    - `settings`: of `clarabel.DefaultSettings`, such as `{"max_iter": 500}`.

    Needs `pip install "bilevax[qp]"`.

    **Cost:** the matrices, which are formed dense and handed over sparse, and what Clarabel takes.

    **Exact when** the program is convex and Clarabel has converged.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.Clarabel(settings={"max_iter": 500})
        ```

    Reference: Goulart and Chen, "Clarabel: an interior-point solver for conic programs with
    quadratic objectives", 2024.
    """

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    settings: dict[str, Any] | None = eqx.field(default=None, static=True)

    def run(self, program: Matrices) -> tuple[Array, Array, Array]:
        return _on_host(partial(self._run, _imported("clarabel", "Clarabel")), program)

    def _run(self, clarabel: Any, at: _Sparse) -> tuple[Any, Any, Any]:
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = _TOLERANCE
        for name, value in (self.settings or {}).items():
            setattr(settings, name, value)
        cones = [clarabel.ZeroConeT(len(at.b)), clarabel.NonnegativeConeT(len(at.h))]
        cones = [cone for cone in cones if cone.dim > 0]
        sides = np.concatenate([at.b, at.h])
        found = clarabel.DefaultSolver(at.upper, at.q, at.rows, sides, cones, settings).solve()
        return found.x, found.z[: len(at.b)], found.z[len(at.b) :]


class OSQP(AbstractProgramSolver):
    """OSQP, an operator splitting method for sparse quadratic programs, on the host.

    Inside `jax.jit` it is a callback; a batch is solved one by one.

    **Arguments:**

    - `rtol`, `atol`: what the residual of its answer must meet; see `bx.InteriorPoint`.
    - `settings`: of OSQP's `setup`, such as `{"max_iter": 100_000}`. By default it stops at 1e-10
        and polishes.

    Needs `pip install "bilevax[qp]"`.

    **Cost:** the matrices, which are formed dense and handed over sparse, and what OSQP takes.

    **Exact when** the program is convex and OSQP has converged.

    !!! example

        ```python
        import bilevax as bx

        solver = bx.OSQP(settings={"max_iter": 100_000})
        ```

    Reference: Stellato et al., "OSQP: an operator splitting solver for quadratic programs", 2020.
    """

    rtol: float | Scalar | None = None
    atol: float | Scalar = 0.0
    settings: dict[str, Any] | None = eqx.field(default=None, static=True)

    def run(self, program: Matrices) -> tuple[Array, Array, Array]:
        return _on_host(partial(self._run, _imported("osqp", "OSQP")), program)

    def _run(self, osqp: Any, at: _Sparse) -> tuple[Any, Any, Any]:
        settings = {
            "verbose": False,
            "eps_abs": _TOLERANCE,
            "eps_rel": _TOLERANCE,
            "polishing": True,
            "max_iter": 20_000,
        }
        solver = osqp.OSQP()
        low = np.concatenate([at.b, np.full(len(at.h), -np.inf)])
        high = np.concatenate([at.b, at.h])
        solver.setup(at.upper, at.q, at.rows, low, high, **(settings | (self.settings or {})))
        found = solver.solve(raise_error=False)
        return found.x, found.y[: len(at.b)], np.maximum(found.y[len(at.b) :], 0)


def _on_host(run: Callable, program: Matrices) -> tuple[Array, Array, Array]:
    """`run` of sparse matrices in double precision, in a callback: x and its multipliers."""
    from scipy import sparse

    shapes = tuple(
        jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (program.q, program.b, program.h)
    )

    def host(program: Matrices) -> tuple[np.ndarray, ...]:
        Q, q, A, b, G, h = (np.asarray(part, np.float64) for part in program)
        upper = sparse.csc_matrix(np.triu(Q))
        found = run(_Sparse(upper, q, sparse.csc_matrix(np.concatenate([A, G])), b, h))
        # What has failed may have no numbers to give.
        return tuple(
            np.asarray(part, s.dtype) if np.shape(part) == s.shape else np.full(s.shape, np.nan)
            for part, s in zip(found, shapes, strict=True)
        )

    return jax.pure_callback(host, shapes, program, vmap_method="sequential")


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'`bx.{name}` needs {module.partition(".")[0]}: pip install "bilevax[qp]". '
            "bx.InteriorPoint() needs nothing."
        ) from error
