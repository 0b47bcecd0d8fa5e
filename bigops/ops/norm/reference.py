"""Layer norm and RMS norm in plain torch: the meaning of the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.formats.quantize import act_quant


def summed(x: Tensor, residual: Tensor | None) -> Tensor:
    """``x + residual`` in float32."""
    return x.float() if residual is None else x.float() + residual.float()


def normed(v: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """The norm of float32 rows ``v`` [.., K], in float32."""
    if kind == "layer":
        v = v - v.mean(-1, keepdim=True)
        v = v - v.mean(-1, keepdim=True)  # what the rounding of a large mean left
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    return y if bias is None else y + bias.float()


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layer",
) -> Tensor:
    """The meaning of `bigops.norm` in plain torch; any device, differentiable."""
    return normed(summed(x, residual), weight, bias, eps, kind).to(x.dtype)


def quantised(y: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 rows as ``(values, scale, zero_point)`` of `bigops.norm_act_quant`."""
    rows = act_quant(y, "symmetric" if symmetric else "dynamic")
    scale, zero_point = rows.scale.squeeze(-1), rows.zero_point.squeeze(-1)
    return rows.q.to(torch.uint8), scale, zero_point.to(torch.int32)
