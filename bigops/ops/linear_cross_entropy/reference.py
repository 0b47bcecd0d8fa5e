"""Parts of `linear_cross_entropy`: checks, reductions, the pass over logits in plain torch."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks

REDUCTIONS = ("mean", "sum", "none")


def check_options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Raise ValueError or TypeError for a number or a name that the op does not take."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"ignore_index: expected an int; got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1; got {label_smoothing}")
    if not (0 <= z_loss < math.inf):
        raise ValueError(f"z_loss: expected a finite number of at least 0; got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive finite number or None; got {softcap}")


def check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    check_options(reduction, ignore_index, label_smoothing, z_loss, softcap or None)
    checks.floating("x", x)
    checks.matrix("weight", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected shape [.., {weight.shape[1]}] for a weight of "
            f"{list(weight.shape)}; got {list(x.shape)}"
        )
    checks.like("weight", weight, x)
    checks.dtype("target", target, torch.int64)
    checks.shape("target", target, x.shape[:-1])
    checks.device("target", target, x)
    if bias is not None:
        checks.shape("bias", bias, [weight.shape[0]])
        checks.like("bias", bias, x)
    if class_weight is not None:
        checks.shape("class_weight", class_weight, [weight.shape[0]])
        checks.floating("class_weight", class_weight)
        checks.device("class_weight", class_weight, x)


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is neither a class nor ``ignore_index``."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"target: expected classes 0 to {classes - 1} or ignore_index {ignore_index}; "
            f"got {int(target[bad][0])}"
        )


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


def no_double_backward(*_: Any) -> NoReturn:
    raise RuntimeError(
        "linear_cross_entropy: double backward is not implemented; "
        "bigops.ops.linear_cross_entropy.reference has gradients of every order"
    )


class _Tied(torch.autograd.Function):
    """Ties a gradient to what it was made of, so that differentiating it raises: it would count
    as a constant otherwise."""

    @staticmethod
    def forward(ctx, grad, *sources):  # type: ignore[no-untyped-def]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        no_double_backward()


def tied(grads: tuple[Any, ...], *sources: Tensor | None) -> tuple[Any, ...]:
    return tuple(g if g is None else _Tied.apply(g, *sources) for g in grads)
