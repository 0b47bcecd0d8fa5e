"""`attention` in plain torch: its meaning, and what serves it where it has no kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.ops.attention.check import check


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The meaning of `attention` in plain torch; differentiable, any device and dtype.

    The scores are held as a whole, in float32 for bf16 and fp16.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = default_scale(q) if scale is None else scale
    heads = k.shape[1]
    grouped = q.to(wide).unflatten(1, (heads, q.shape[1] // max(heads, 1)))  # [B, Hkv, G, T, D]
    scores = (grouped * scale @ k.to(wide).unsqueeze(2).mT).flatten(1, 2)  # [B, Hq, T, S]
    if mask is not None:
        shut = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if shut else scores + mask.to(wide)
    if causal:
        scores = scores.masked_fill(~_causal(q, k), -math.inf)
    shut = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.where(shut, 0.0, torch.softmax(torch.where(shut, 0.0, scores), -1))
    grouped = p.unflatten(1, (heads, -1)) @ v.to(wide).unsqueeze(2)
    return laid_out(grouped.flatten(1, 2).to(q.dtype))


def serve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    bf16: bool = False,
) -> Tensor:
    """By torch's scaled_dot_product_attention, whose products are of the dtype that came."""
    check(q, k, v, mask, scale)
    backend.note("reference.attention")
    if mask is not None:
        mask = torch.atleast_2d(mask if mask.dtype == torch.bool else mask.to(q.dtype))
    if mask is not None and causal:  # torch's kernels for GPUs take one of the two
        shut = False if mask.dtype == torch.bool else -math.inf
        mask, causal = mask.masked_fill(~_causal(q, k), shut), False
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return laid_out(y)


def default_scale(q: Tensor) -> float:
    """1 / sqrt(D)."""
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def laid_out(y: Tensor) -> Tensor:
    """[B, H, T, D] in the memory of [B, T, H, D]."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
