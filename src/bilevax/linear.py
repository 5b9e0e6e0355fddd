"""Solvers of the adjoint system `A v = b`, for `Implicit(linear_solver)` and its siblings.

Any solver of Lineax will do; these are ours.
"""

from ._linear import (
    CG,
    GMRES,
    LU,
    MINRES,
    Chebyshev,
    Direct,
    GradientDescent,
    Neumann,
    Recycled,
)

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "MINRES",
    "Chebyshev",
    "Direct",
    "GradientDescent",
    "Neumann",
    "Recycled",
]
