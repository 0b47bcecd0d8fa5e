"""The path from the loss to its Triton kernel (kernels/linear_cross_entropy.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.choice import Choice
from bigops.ops.linear_cross_entropy.reference import predicted
from bigops.ops.linear_cross_entropy.reference import serve_chunk as reference


def why_not(dtype: torch.dtype, target: targets.Target) -> str:
    """The reason why no kernel passes over logits on ``target``; empty where one does."""
    return targets.why_not(dtype, target, "fused_linear")


def serve_chunk(logits: Tensor, target: Tensor, bias: Tensor | None, *args: Any) -> Any:
    """The pass over a chunk on a GPU: losses, logsumexp, predictions; logits become their gradient.

    Plain torch serves where the kernel does not, and finds the predictions.
    """
    if why_not(logits.dtype, logits.device):
        return reference(logits, target, bias, *args)
    from bigops.kernels import linear_cross_entropy as kernels

    *options, gradient, predict = args
    predictions = target.new_empty(0)
    if predict:  # before the gradient takes the logits' place
        predictions = predicted(logits, bias)
    kinds = {"gradient": gradient, "with_lse": predict}
    losses, lse = kernels.chunk(logits, target, bias, *options, **kinds)
    form = "gradient" if gradient else "loss"
    backend.note(f"triton.linear_cross_entropy.{checks.short(logits.dtype)}.{form}")
    return losses, lse, predictions


def explain_chunk(target: str, dtype: torch.dtype, classes: int, config: dict[str, Any]) -> Choice:
    """Kernel, config and reason of the pass over logits on ``target`` ("cuda", "sm_90" ...)."""
    from bigops.kernels import linear_cross_entropy as kernels

    op = "linear_cross_entropy"
    block, warps = kernels.block_size(targets.present(target), classes)
    name = f"triton.{op}.{checks.short(dtype)}.gradient"
    reason = f"own pass over chunks of {config['chunk']} tokens, one program a token"
    return Choice.of(op, name, reason, {**config, "block": block, "num_warps": warps})
