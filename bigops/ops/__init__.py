"""Torch ops. One line per op: the module registers schema, reference, fake, autograd, kernels."""

from bigops.ops import fused_linear as _fused_linear

__all__ = ["fused_linear"]
fused_linear = _fused_linear.fused_linear
