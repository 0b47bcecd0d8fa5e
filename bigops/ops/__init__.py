"""Torch ops. One line per op: the module registers schema, reference, fake, autograd, kernels."""

from bigops.ops import fused_linear as _fused_linear
from bigops.ops import linear_cross_entropy as _linear_cross_entropy
from bigops.ops import quantized_linear as _quantized_linear
from bigops.ops import sparse_linear as _sparse_linear

__all__ = ["fused_linear", "linear_cross_entropy", "quantized_linear", "sparse_linear"]
fused_linear = _fused_linear.fused_linear
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
quantized_linear = _quantized_linear.quantized_linear
sparse_linear = _sparse_linear.sparse_linear
