"""Preconditioners of the adjoint system, for `Implicit(preconditioner=...)`."""

from ._precondition import (
    AdamState,
    Jacobi,
    Nystrom,
    QuasiNewton,
)

__all__ = [
    "AdamState",
    "Jacobi",
    "Nystrom",
    "QuasiNewton",
]
