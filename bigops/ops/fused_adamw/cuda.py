"""The road from the optimiser steps to their CUDA C++ kernels (csrc/cuda/fused_adamw.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.kernels.common.tiles import device_arch
from bigops.ops.library import LIB
from bigops.ops.linear_cross_entropy import triton as _triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LIB.define(
    "fused_adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] exp_avg_scales, "
    "Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] copies, Tensor[] maps, bool steps_on_device, "
    "Tensor? norm, float clip_norm, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize, float grad_factor, int[] streams, int seed, "
    "int rounding_step) -> ()"
)  # the kernels by themselves, for a GPU only
LIB.define("fused_grad_norm_step(Tensor[] grads) -> Tensor")


def serves(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels run where these parameters or gradients are."""
    return (
        len(tensors) > 0
        and tensors[0].is_cuda
        and not backend.cuda_error
        and backend.cuda_runs_on(device_arch(tensors[0].device))
    )


def serves_step(params: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Whether they serve a step; float64 takes plain torch, steps of two devices Triton."""
    return (
        serves(params)
        and {p.dtype for p in params} <= set(DTYPES)
        and len({step.device for step in steps}) == 1
    )


def counts(params: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Whether they read the norm and count the steps themselves, so that no host waits."""
    return serves_step(params, steps) and steps[0].device == params[0].device


def serves_on(target: str) -> bool:
    """Whether they are built for ``target``: "cuda" or an architecture such as "sm_90"."""
    if target == "cuda":
        if backend.cuda_error or not torch.cuda.is_available():
            return False
        target = device_arch(torch.device("cuda", torch.cuda.current_device()))
    return backend.cuda_runs_on(target)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    *rest: Any,
    norm: Tensor | None = None,
    clip_norm: float = math.inf,
) -> None:
    """One step by the arguments of the op `fused_adamw`; ``norm`` as in the public function."""
    device = params[0].device
    coded = any(state.dtype == torch.uint8 for state in exp_avgs)
    lists = (
        params, grads, exp_avgs, exp_avg_sqs, steps, exp_avg_scales, exp_avg_sq_scales, copies
    )  # fmt: skip
    torch.ops.bigops.fused_adamw_step(
        *lists,
        _triton.maps_of(device) if coded else (),
        steps[0].device == device,
        norm,
        clip_norm,
        *rest,
    )
    names = {(p.dtype, m.dtype) for p, m in zip(params, exp_avgs, strict=True) if p.numel()}
    for dtype, state in sorted(names, key=str):
        form = "8bit" if state == torch.uint8 else "fused"
        backend.note(f"cuda.fused_adamw.{checks.short(dtype)}.{form}")


def norm(grads: Sequence[Tensor]) -> Tensor:
    """`fused_grad_norm` of at least one gradient."""
    result: Tensor = torch.ops.bigops.fused_grad_norm_step(grads)
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        backend.note(f"cuda.fused_grad_norm.{checks.short(dtype)}.double")
    return result
