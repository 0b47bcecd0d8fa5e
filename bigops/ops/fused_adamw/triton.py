"""The path from the optimiser steps to their Triton kernels (kernels/fused_adamw.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops.fused_adamw import states
from bigops.ops.fused_adamw.reference import adamw_numbers, places, sgd_numbers


@functools.cache
def maps_of(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and buckets of the signed map of 8-bit states, then of the unsigned one."""
    return tuple(  # type: ignore[return-value]
        table(signed).to(device)
        for signed in (True, False)
        for table in (states.dynamic_map, states.buckets)
    )


def _names(op: str, params: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    for i, param in enumerate(params):
        if param.numel():
            coded = len(first) > 0 and first[i].dtype == torch.uint8
            form = "8bit" if coded else "fused"
            backend.note(f"triton.{op}.{checks.short(param.dtype)}.{form}")


def adamw(step: Any) -> None:
    """The op `fused_adamw`."""
    from bigops.kernels.fused_adamw import launch

    launch.adamw(
        launch.Step(
            step.params,
            step.grads,
            step.exp_avgs,
            step.exp_avg_sqs,
            step.exp_avg_scales,
            step.exp_avg_sq_scales,
            step.copies,
            step.streams,
            step.seed,
            step.rounding_step,
            places(step),
        ),
        step.steps,
        maps_of(step.params[0].device),
        *adamw_numbers(step),
        step.decoupled,
    )
    _names("fused_adamw", step.params, step.exp_avgs)


def sgd(step: Any) -> None:
    """The op `fused_sgd`."""
    from bigops.kernels.fused_adamw import launch

    launch.sgd(
        launch.Step(
            step.params,
            step.grads,
            first=step.momentum_buffers,
            second=(),
            first_scales=step.momentum_scales,
            second_scales=(),
            copies=step.copies,
            streams=step.streams,
            seed=step.seed,
            rounding_step=step.rounding_step,
            places=places(step),
        ),
        maps_of(step.params[0].device),
        *sgd_numbers(step),
    )
    _names("fused_sgd", step.params, step.momentum_buffers)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The op `fused_grad_norm`."""
    from bigops.kernels.fused_adamw import launch

    result = launch.norm(grads)
    for grad in grads:
        backend.note(f"triton.fused_grad_norm.{checks.short(grad.dtype)}.double")
    return result
