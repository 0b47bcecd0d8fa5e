"""Rotary embeddings in plain torch: the meaning of `rotary`."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.ops.attention.reference import laid_out


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The meaning of `bigops.rotary` in plain torch; any device, differentiable, float64 too."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    r = cos.shape[-1]
    v = x[..., :r].to(wide)
    turned = torch.cat([-v[..., r // 2 :], v[..., : r // 2]], -1)
    y = v * _by_head(cos).to(wide) + turned * _by_head(sin).to(wide)
    return laid_out(torch.cat([y.to(x.dtype), x[..., r:]], -1))


def _by_head(table: Tensor) -> Tensor:
    return table.unsqueeze(1) if table.dim() == 3 else table
