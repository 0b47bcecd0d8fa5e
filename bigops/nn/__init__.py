"""Layers: parameters and one op call each."""

from bigops.nn.fuse import fuse_
from bigops.nn.gated_mlp import GatedMLP
from bigops.nn.linear import Linear
from bigops.nn.linear_cross_entropy import LinearCrossEntropy
from bigops.nn.plain import plain
from bigops.nn.quant_linear import QuantLinear
from bigops.nn.sparse_linear import SparseLinear

__all__ = [
    "GatedMLP",
    "Linear",
    "LinearCrossEntropy",
    "QuantLinear",
    "SparseLinear",
    "fuse_",
    "plain",
]
