"""Torch ops. One line per op: the module registers schema, reference, fake, autograd, kernels."""

from bigops.ops import fp8_linear as _fp8_linear
from bigops.ops import fused_adamw as _fused_adamw
from bigops.ops import fused_linear as _fused_linear
from bigops.ops import linear_cross_entropy as _linear_cross_entropy
from bigops.ops import low_rank_linear as _low_rank_linear
from bigops.ops import packed_linear as _packed_linear
from bigops.ops import quantized_linear as _quantized_linear
from bigops.ops import sparse_linear as _sparse_linear

__all__ = [
    "fp8_linear",
    "fused_adamw",
    "fused_grad_norm",
    "fused_linear",
    "fused_sgd",
    "linear_cross_entropy",
    "low_rank_linear",
    "packed_linear",
    "quantized_linear",
    "sparse_linear",
]
fp8_linear = _fp8_linear.fp8_linear
fused_adamw = _fused_adamw.fused_adamw
fused_grad_norm = _fused_adamw.fused_grad_norm
fused_sgd = _fused_adamw.fused_sgd
fused_linear = _fused_linear.fused_linear
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
low_rank_linear = _low_rank_linear.low_rank_linear
packed_linear = _packed_linear.packed_linear
quantized_linear = _quantized_linear.quantized_linear
sparse_linear = _sparse_linear.sparse_linear
