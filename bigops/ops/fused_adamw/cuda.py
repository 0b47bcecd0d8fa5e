"""The path from the optimiser steps to their CUDA C++ kernels (csrc/cuda/fused_adamw.cu)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops.fused_adamw.triton import maps_of
from bigops.ops.targets import Target, cuda_built_for

OPS = ("fused_adamw", "fused_grad_norm")
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def serves(op: str, dtypes: Collection[torch.dtype], target: Target) -> bool:
    """Whether they serve ``op`` for parameters of these dtypes; float64 takes plain torch."""
    return op in OPS and DTYPES.issuperset(dtypes) and cuda_built_for(target)


def counts(params: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Whether they read the norm and count the steps themselves, so that no host waits."""
    device = params[0].device
    if any(step.device != device for step in steps):
        return False
    return serves("fused_adamw", {p.dtype for p in params}, device)


def adamw(step: Any, norm: Tensor | None = None, clip_norm: float = math.inf) -> None:
    """The op `fused_adamw`; ``norm`` and ``clip_norm`` as in the public function."""
    device = step.params[0].device
    coded = any(state.dtype == torch.uint8 for state in step.exp_avgs)
    torch.ops.bigops.fused_adamw_step(
        step.params,
        step.grads,
        step.exp_avgs,
        step.exp_avg_sqs,
        step.steps,
        step.exp_avg_scales,
        step.exp_avg_sq_scales,
        step.copies,
        maps_of(device) if coded else (),
        step.steps[0].device == device,
        norm,
        clip_norm,
        step.lr,
        step.beta1,
        step.beta2,
        step.eps,
        step.weight_decay,
        step.decoupled,
        step.maximize,
        step.grad_factor,
        step.streams,
        step.seed,
        step.rounding_step,
        step.firsts,
        step.runs,
        step.strides,
    )
    pairs = zip(step.params, step.exp_avgs, strict=True)
    for dtype, state in sorted({(p.dtype, m.dtype) for p, m in pairs if p.numel()}, key=str):
        form = "8bit" if state == torch.uint8 else "fused"
        backend.note(f"cuda.fused_adamw.{checks.short(dtype)}.{form}")


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The op `fused_grad_norm` of at least one gradient."""
    result: Tensor = torch.ops.bigops.fused_grad_norm_step(grads)
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        backend.note(f"cuda.fused_grad_norm.{checks.short(dtype)}.double")
    return result
