"""Preconditioners of the adjoint system."""

from ._adam_state import AdamState as AdamState
from ._base import (
    AbstractPreconditioner as AbstractPreconditioner,
    as_preconditioner as as_preconditioner,
)
from ._jacobi import Jacobi as Jacobi
from ._nystrom import Nystrom as Nystrom
from ._quasi_newton import QuasiNewton as QuasiNewton
