"""Terms that are not smooth, by their proximal steps."""

from ._base import AbstractProx as AbstractProx, At as At, Piece as Piece
from ._groups import GroupL2 as GroupL2, SparseGroup as SparseGroup
from ._norms import L1 as L1, ElasticNet as ElasticNet, WeightedL1 as WeightedL1
from ._others import Nuclear as Nuclear, Own as Own, PerLeaf as PerLeaf, as_prox as as_prox
from ._sets import (
    Box as Box,
    L1Ball as L1Ball,
    L2Ball as L2Ball,
    NonNegative as NonNegative,
    Simplex as Simplex,
)
from ._total_variation import TotalVariation1D as TotalVariation1D
