"""`linear_cross_entropy` in plain torch: as a whole, and its pass over a chunk of logits."""

from __future__ import annotations

import math

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
    """The class weight of each token's target: 1 without weights, 0 where it is ignored.

    Of class probabilities the weights' sum by them.
    """
    if target.is_floating_point():
        shares = target.to(dtype)
        return (shares if class_weight is None else shares * class_weight.to(dtype)).sum(-1)
    kept = target != ignore_index
    if class_weight is None:
        return kept.to(dtype)
    if class_weight.numel() == 0:
        return torch.zeros_like(target, dtype=dtype)
    own = class_weight.to(dtype)[torch.where(kept, target, 0)]
    return torch.where(kept, own, torch.zeros((), dtype=dtype, device=target.device))


def counted(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """What each token counts in a mean: its class weight, and 1 with class probabilities."""
    if target.is_floating_point():
        return torch.ones(target.shape[:-1], dtype=dtype, device=target.device)
    return own_weight(target, class_weight, ignore_index, dtype)


def reduced(
    losses: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    first: int = 0,
) -> Tensor:
    """Losses reduced over the dimensions from ``first`` on; "mean" divides by what counts."""
    if reduction == "none":
        return losses
    dims = list(range(first, losses.dim()))

    def total(t: Tensor) -> Tensor:
        return t.sum(dims, dtype=torch.float64) if dims else t.double()

    if reduction == "sum":
        return total(losses).to(losses.dtype)
    own = counted(target, class_weight, ignore_index, losses.dtype)
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
    logits = all_logits(x, weight, bias, softcap)
    tokens = x.shape[:-1]
    y = rows(target) if target.is_floating_point() else target.reshape(-1)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    losses = F.cross_entropy(
        logits,
        y.to(logits.dtype) if y.is_floating_point() else y,
        class_weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        own = own_weight(y, class_weight, ignore_index, logits.dtype)
        kept = torch.where(own != 0, logits.logsumexp(1), 0)
        losses = losses + z_loss * own * kept**2
    return reduced(losses.view(tokens), target, class_weight, reduction, ignore_index)


def all_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None
) -> Tensor:
    """The logits [M, V] in the accumulation dtype."""
    logits = rows(F.linear(x, weight, bias).to(accumulation(x.dtype)))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def divergence(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """The meaning of `linear_kl_div` (beta 0) and `linear_js_div` in plain torch; differentiable by
    x, weight and bias, holds all logits of both heads."""
    own = F.log_softmax(all_logits(x, weight, bias) / temperature, 1)
    theirs = all_logits(teacher_x, teacher_weight, teacher_bias).to(own.dtype).detach()
    theirs = F.log_softmax(theirs / temperature, 1)
    losses = _divergence(own, theirs, beta)[0].view(x.shape[:-1])
    losses = torch.where(target != ignore_index, losses, 0)
    return reduced(losses, target, None, reduction, ignore_index)


def _divergence(own: Tensor, theirs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of rows of log-probabilities, and log(own / mixture) (of beta 0: own)."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(1)

    if not beta:
        return kl(theirs, own), own
    mixture = torch.logaddexp(theirs + math.log(beta), own + math.log1p(-beta))
    return beta * kl(theirs, mixture) + (1 - beta) * kl(own, mixture), own - mixture


# --- the pass over a chunk -----------------------------------------------------------------


def predicted(logits: Tensor, bias: Tensor | None) -> Tensor:
    """The class of the largest logit of each row; of none 0."""
    if not logits.shape[1]:
        return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    return (logits if bias is None else logits + bias).argmax(1)


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
    predict,
):
    """The pass over a chunk in plain torch: losses and logsumexp [M], predictions [M] or none;
    logits become their gradient. ``target`` may be class probabilities [M, V]."""
    backend.note("reference.linear_cross_entropy")
    wide = accumulation(logits.dtype)
    t = logits.to(wide)
    if bias is not None:
        t = t + bias
    if softcap:
        t = softcap * torch.tanh(t / softcap)
    predictions = target.new_empty(0, dtype=torch.int64)
    if predict:
        predictions = predicted(t, None)
    own = own_weight(target, class_weight, ignore_index, wide)
    lse = t.logsumexp(1)
    zero = torch.zeros((), dtype=wide, device=t.device)
    even = label_smoothing / max(1, t.shape[1])
    shares = torch.ones_like(t[:1]) if class_weight is None else class_weight.unsqueeze(0)
    soft = target.is_floating_point()
    if soft:  # what the classes weigh: shares [M, V], mass [M]
        shares = shares * ((1 - label_smoothing) * target.to(wide) + even)
        mass = shares.sum(1)
        kept = torch.ones_like(mass, dtype=torch.bool)
        losses = mass * lse - (shares * t).sum(1)
    else:  # besides the target all the same
        kept = target != ignore_index
        lse = torch.where(kept, lse, zero)
        shares = even * shares
        place = torch.where(kept, target, 0).unsqueeze(1)
        at_target = t.gather(1, place)[:, 0] if t.shape[1] else lse
        mass = (1 - label_smoothing) * own + even * class_weight_sum
        losses = torch.where(kept, own * (lse - at_target), zero)
        if label_smoothing:
            smooth = torch.where(kept, even * class_weight_sum * lse - (shares * t).sum(1), zero)
            losses = (1 - label_smoothing) * losses + smooth
    if z_loss:
        losses = losses + torch.where(kept, z_loss * own * lse**2, zero)
    if gradient:
        if z_loss:
            mass = mass + 2 * z_loss * own * lse
        grads = mass.unsqueeze(1) * torch.exp(t - lse.unsqueeze(1)) - shares
        if t.shape[1] and not soft:
            grads.scatter_add_(1, place, -(1 - label_smoothing) * own.unsqueeze(1))
        if softcap:
            grads = grads * (1 - (t / softcap) ** 2)
        if scale is not None:
            grads = grads * scale.unsqueeze(1)
        logits.copy_(torch.where(kept.unsqueeze(1), grads, zero))
    return losses, lse, predictions


def serve_divergence(
    logits: Tensor,
    teacher: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    beta: float,
    gradient: bool,
) -> Tensor:
    """The divergence [M] of rows of logits from a teacher's; logits become their gradient.

    With p the student's, q the teacher's probabilities and m their mixture the gradient by the
    student's logits is (p - q) / T for beta 0, else p (g - sum p g) / T with
    g = (1 - beta) log(p / m).
    """
    backend.note("reference.linear_cross_entropy")
    wide = accumulation(logits.dtype)

    def log_probabilities(t: Tensor, bias: Tensor | None) -> Tensor:
        t = t.to(wide)
        return F.log_softmax((t if bias is None else t + bias) / temperature, 1)

    own, theirs = log_probabilities(logits, bias), log_probabilities(teacher, teacher_bias)
    losses, ratio = _divergence(own, theirs, beta)
    zero = torch.zeros((), dtype=wide, device=logits.device)
    if gradient:
        p = own.exp()
        if beta:
            g = ratio.mul_(1 - beta)
            grads = g.sub_((p * g).sum(1, keepdim=True)).mul_(p)
        else:
            grads = p.sub_(theirs.exp_())
        grads.mul_((1.0 if scale is None else scale.unsqueeze(1)) / temperature)
        logits.copy_(torch.where(kept.unsqueeze(1), grads, zero))
    return torch.where(kept, losses, zero)
