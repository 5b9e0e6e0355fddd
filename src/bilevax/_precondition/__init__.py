"""Preconditioners of the adjoint system."""

from ._base import (
    AbstractPreconditioner as AbstractPreconditioner,
    as_preconditioner as as_preconditioner,
)
