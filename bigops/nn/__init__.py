"""Layers: parameters and one op call each."""

from bigops.nn.attention import MultiheadAttention
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.embedding import QuantEmbedding
from bigops.nn.fp8_linear import Fp8Linear
from bigops.nn.gated_mlp import GatedMLP
from bigops.nn.layer import Layer
from bigops.nn.linear import Linear
from bigops.nn.linear_cross_entropy import LinearCrossEntropy
from bigops.nn.lora import LoRALinear, QLoRALinear
from bigops.nn.low_rank_linear import LowRankLinear
from bigops.nn.packed_gated_mlp import PackedGatedMLP
from bigops.nn.packed_linear import PackedLinear
from bigops.nn.packed_low_rank_linear import PackedLowRankLinear
from bigops.nn.quant_linear import QuantLinear
from bigops.nn.quant_low_rank_linear import QuantLowRankLinear
from bigops.nn.sparse_linear import SparseLinear

# What a file may name, and what verbs may swap: of just these classes.
LAYERS: tuple[type[Layer], ...] = (
    Linear,
    CompressedLinear,
    Fp8Linear,
    GatedMLP,
    LowRankLinear,
    PackedGatedMLP,
    PackedLinear,
    PackedLowRankLinear,
    QuantEmbedding,
    QuantLinear,
    QuantLowRankLinear,
    SparseLinear,
)

__all__ = [
    "LAYERS",
    "CompressedLinear",
    "Fp8Linear",
    "GatedMLP",
    "Layer",
    "Linear",
    "LinearCrossEntropy",
    "LoRALinear",
    "LowRankLinear",
    "MultiheadAttention",
    "PackedGatedMLP",
    "PackedLinear",
    "PackedLowRankLinear",
    "QLoRALinear",
    "QuantEmbedding",
    "QuantLinear",
    "QuantLowRankLinear",
    "SparseLinear",
]
