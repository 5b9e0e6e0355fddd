"""Penalties and sets of inner problems, for `ProximalMinimum(fn, prox)`."""

from ._prox import (
    L1,
    Box,
    ElasticNet,
    GroupL2,
    L1Ball,
    L2Ball,
    NonNegative,
    Nuclear,
    Own,
    PerLeaf,
    Simplex,
    SparseGroup,
    TotalVariation1D,
    WeightedL1,
)

__all__ = [
    "L1",
    "Box",
    "ElasticNet",
    "GroupL2",
    "L1Ball",
    "L2Ball",
    "NonNegative",
    "Nuclear",
    "Own",
    "PerLeaf",
    "Simplex",
    "SparseGroup",
    "TotalVariation1D",
    "WeightedL1",
]
