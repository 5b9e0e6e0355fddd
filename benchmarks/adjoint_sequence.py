"""How many Hessian products does a sequence of slowly changing adjoint systems take?"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _common import arguments, print_header, print_table
from jaxtyping import Array

import bilevax as bx
from bilevax._linear import AbstractIterativeLinearSolver
from bilevax._precondition import AbstractPreconditioner

RTOL = 1e-6
DRIFTS = (1e-3, 1e-2)


def main() -> None:
    args = arguments(__doc__ or "")
    jax.config.update("jax_enable_x64", True)
    print_header(__doc__ or "")
    d, num_systems = (60, 3) if args.quick else (2_000, 20)
    print(f"A = X' diag(exp(theta)) X, d = {d}, float64; at the first of {num_systems} systems")
    print("condition number 1e6. Between two systems every entry of theta moves by the drift")
    print("times a normal number, so that A and b change by that much in relative terms, in")
    print(f"eigenvalues and eigenvectors. Relative residual {RTOL:g}. All products are counted:")
    print("those of sketches, of A W, of the guess, and of checks of the residual.\n")
    methods = METHODS[::3] if args.quick else METHODS
    for name, spectrum in spectra(d).items():
        print(f"Spectrum: {name}\n")
        totals = [run(method, spectrum, num_systems) for method in methods]
        cells = [
            [f"{total:,} ({cold / total:.1f})" for total, cold in zip(row, totals[0], strict=True)]
            for row in totals
        ]
        header = ("products (cold CG / this)", *(f"drift {drift:g}" for drift in DRIFTS))
        print_table(header, [(m.name, *row) for m, row in zip(methods, cells, strict=True)])
        if args.quick:
            break


def spectra(d: int) -> dict[str, np.ndarray]:
    """The eigenvalues of the first system, largest first."""
    bulk, small = np.linspace(1.0, 1e-2, d - 20), np.logspace(-3.0, -6.0, 20)
    return {
        "logarithmic decay from 1 to 1e-6": np.logspace(0.0, -6.0, d),
        "20 small ones, 1e-3 to 1e-6; the others from 1 to 1e-2": np.concatenate([bulk, small]),
    }


class Method(NamedTuple):
    """A solver, a preconditioner or none, and whether the last solution is the guess."""

    name: str
    is_warm: bool = True
    rank: int | None = None  # of Recycled
    preconditioner: AbstractPreconditioner | None = None

    @property
    def solver(self) -> AbstractIterativeLinearSolver:
        cg = bx.linear.CG(rtol=RTOL, max_steps=50_000)
        return cg if self.rank is None else bx.linear.Recycled(cg, self.rank)


METHODS = (
    Method("cold CG", is_warm=False),
    Method("warm CG"),
    Method("cold, Jacobi", is_warm=False, preconditioner=bx.precondition.Jacobi()),
    Method("cold, Nystrom 200", is_warm=False, preconditioner=bx.precondition.Nystrom(200)),
    Method("cold, recycled 20", is_warm=False, rank=20),
    *(
        Method(f"warm, Nystrom {rank}", preconditioner=bx.precondition.Nystrom(rank))
        for rank in (200, 500, 1_000, 2_000)
    ),
    *(Method(f"warm, recycled {rank}", rank=rank) for rank in (20, 40)),
    Method("warm, recycled 20, Nystrom 100", rank=20, preconditioner=bx.precondition.Nystrom(100)),
)


def run(method: Method, spectrum: np.ndarray, num_systems: int) -> list[int]:
    """All products of the sequence, for every drift; every solution is checked."""
    matvec = least_squares(spectrum)
    condition = bx.Minimum(lambda v, theta: 0.5 * jnp.sum(v * matvec(theta, v)))
    solver, preconditioner = method.solver, method.preconditioner

    @jax.jit
    def solve(theta: Array, b: Array, v0: Array, state: Any) -> Any:
        def product(v: Array) -> Array:
            return matvec(theta, v)

        linear, memory = state
        apply, extra = None, 0
        if preconditioner is not None:
            apply, memory, extra = preconditioner.prepare(
                product, condition, b, theta, None, memory
            )
        solution, linear = solver.resume(product, b, v0, apply, linear)
        if preconditioner is not None:
            memory = preconditioner.learn(memory, solution.num_steps)
        residual = jnp.linalg.norm(product(solution.value) - b) / jnp.linalg.norm(b)
        return solution, solution.num_products + extra, residual, (linear, memory)

    totals = []
    for drift in DRIFTS:
        v, total = jnp.zeros(spectrum.size), 0
        memory = None if preconditioner is None else preconditioner.init(v)
        state = (solver.start(v), memory)
        for theta, b in systems(spectrum.size, drift, num_systems):
            v0 = v if method.is_warm else jnp.zeros_like(v)
            solution, num_products, residual, state = solve(theta, b, v0, state)
            v, total = solution.value, total + int(num_products)
            if not residual <= 1.01 * RTOL:
                raise RuntimeError(f"{method.name}: {bx.RESULTS[solution.result]} {residual:.1e}")
        totals.append(total)
    return totals


def systems(d: int, drift: float, num_systems: int) -> Iterator[tuple[Array, Array]]:
    """`theta` and `b` of every system: a random walk, which nothing can extrapolate."""
    rng = np.random.default_rng(1)
    theta, b = np.zeros(d), rng.standard_normal(d)
    for _ in range(num_systems):
        yield jnp.asarray(theta), jnp.asarray(b)
        theta, b = theta + drift * rng.standard_normal(d), b + drift * rng.standard_normal(d)


def least_squares(spectrum: np.ndarray) -> Callable[[Array, Array], Array]:
    """`X' diag(exp(theta)) X v`, `X` with the roots of `spectrum` as singular values.

    Its singular vectors are Hartley transforms with signs: random for all that CG sees,
    and a product costs four fast transforms instead of a dense matrix.
    """
    d = spectrum.size
    rng = np.random.default_rng(0)
    left, right = jnp.asarray(rng.choice([-1.0, 1.0], (2, d)))
    roots = jnp.asarray(np.sqrt(spectrum))

    def hartley(x: Array) -> Array:
        transformed = jnp.fft.fft(x)
        return (transformed.real - transformed.imag) / jnp.sqrt(1.0 * d)

    def matvec(theta: Array, v: Array) -> Array:
        prediction = hartley(left * hartley(roots * hartley(right * v)))
        residual = jnp.exp(theta) * prediction
        return right * hartley(roots * hartley(left * hartley(residual)))

    return matvec


if __name__ == "__main__":
    sys.exit(main())
