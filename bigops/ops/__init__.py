"""Torch ops. One line per op: the module registers schema, reference, fake, autograd, kernels."""

from bigops.ops.act_quant import act_quant
from bigops.ops.attention import attention
from bigops.ops.fp8_linear import fp8_linear
from bigops.ops.fused_adamw import fused_adamw, fused_grad_norm, fused_sgd
from bigops.ops.fused_linear import fused_linear
from bigops.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_js_div,
    linear_kl_div,
)
from bigops.ops.low_rank_linear import low_rank_linear
from bigops.ops.norm import norm, norm_act_quant, norm_with_sum
from bigops.ops.packed_linear import packed_linear
from bigops.ops.quantized_embedding import quantized_embedding
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.rotary import rotary
from bigops.ops.sparse_linear import sparse_linear

__all__ = [
    "act_quant",
    "attention",
    "fp8_linear",
    "fused_adamw",
    "fused_grad_norm",
    "fused_linear",
    "fused_sgd",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "low_rank_linear",
    "norm",
    "norm_act_quant",
    "norm_with_sum",
    "packed_linear",
    "quantized_embedding",
    "quantized_linear",
    "rotary",
    "sparse_linear",
]
