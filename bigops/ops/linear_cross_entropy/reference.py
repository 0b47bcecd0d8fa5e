"""`linear_cross_entropy` in plain torch: as a whole, and its pass over a chunk of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.formats.base import rows


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and sums over tokens are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def own_weight(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """The class weight of each token's target: 1 without weights, 0 where it is ignored."""
    kept = target != ignore_index
    if class_weight is None:
        return kept.to(dtype)
    if class_weight.numel() == 0:
        return torch.zeros_like(target, dtype=dtype)
    own = class_weight.to(dtype)[torch.where(kept, target, 0)]
    return torch.where(kept, own, torch.zeros((), dtype=dtype, device=target.device))


def reduced(
    losses: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    first: int = 0,
) -> Tensor:
    """Losses reduced over the dimensions from ``first`` on; "mean" divides by the class weights."""
    if reduction == "none":
        return losses
    dims = list(range(first, losses.dim()))

    def total(t: Tensor) -> Tensor:
        return t.sum(dims, dtype=torch.float64) if dims else t.double()

    if reduction == "sum":
        return total(losses).to(losses.dtype)
    own = own_weight(target, class_weight, ignore_index, losses.dtype)
    return (total(losses) / total(own)).to(losses.dtype)


def reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The meaning of `linear_cross_entropy` in plain torch; differentiable, holds all logits."""
    logits = F.linear(x, weight, bias)
    logits = rows(logits.to(accumulation(x.dtype)))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    y = target.reshape(-1)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    losses = F.cross_entropy(
        logits,
        y,
        class_weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        own = own_weight(y, class_weight, ignore_index, logits.dtype)
        kept = torch.where(y != ignore_index, logits.logsumexp(1), 0)
        losses = losses + z_loss * own * kept**2
    return reduced(losses.view(target.shape), target, class_weight, reduction, ignore_index)


def serve_chunk(  # type: ignore[no-untyped-def]
    logits,
    target,
    bias,
    class_weight,
    scale,
    class_weight_sum,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    gradient,
):
    """The pass over a chunk in plain torch: losses [M]; logits become their gradient."""
    backend.note("reference.linear_cross_entropy")
    wide = accumulation(logits.dtype)
    t = logits.to(wide)
    if bias is not None:
        t = t + bias
    if softcap:
        t = softcap * torch.tanh(t / softcap)
    own = own_weight(target, class_weight, ignore_index, wide)
    kept = target != ignore_index
    place = torch.where(kept, target, 0).unsqueeze(1)
    lse = t.logsumexp(1)
    zero = torch.zeros((), dtype=wide, device=t.device)
    at_target = t.gather(1, place)[:, 0] if t.shape[1] else lse
    losses = torch.where(kept, own * (lse - at_target), zero)
    even = label_smoothing / max(1, t.shape[1])
    shares = torch.ones_like(t[:1]) if class_weight is None else class_weight.unsqueeze(0)
    if label_smoothing:
        smooth = torch.where(kept, even * (class_weight_sum * lse - (shares * t).sum(1)), zero)
        losses = (1 - label_smoothing) * losses + smooth
    if z_loss:
        losses = losses + torch.where(kept, z_loss * own * lse**2, zero)
    if gradient:
        mass = (1 - label_smoothing) * own + even * class_weight_sum
        if z_loss:
            mass = mass + 2 * z_loss * own * lse
        grads = mass.unsqueeze(1) * torch.exp(t - lse.unsqueeze(1)) - even * shares
        if t.shape[1]:
            grads.scatter_add_(1, place, -(1 - label_smoothing) * own.unsqueeze(1))
        if softcap:
            grads = grads * (1 - (t / softcap) ** 2)
        if scale is not None:
            grads = grads * scale.unsqueeze(1)
        logits.copy_(torch.where(kept.unsqueeze(1), grads, zero))
    return losses
