"""fused_adamw, fused_sgd, fused_grad_norm: an optimiser step over many tensors in two passes.

Pass 1 (`fused_grad_norm`) reads the gradients once: their norm, which is inf or NaN where one of
them is. Pass 2 unscales, clips, updates and writes the low-precision copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.ops.fused_adamw import choose as choose  # registers the kernels of GPUs
from bigops.ops.fused_adamw import cuda, lists
from bigops.ops.fused_adamw.reference import reference_adamw, reference_norm, reference_sgd
from bigops.ops.fused_adamw.schema import (
    AdamWStep,
    SGDStep,
    adamw_op,
    count_versions,
    norm_op,
    step_adamw,
    step_sgd,
    transposed,
)

__all__ = [
    "AdamWStep",
    "SGDStep",
    "fused_adamw",
    "fused_grad_norm",
    "fused_sgd",
    "reference_adamw",
    "reference_norm",
    "reference_sgd",
    "step_adamw",
    "step_sgd",
]


@torch.no_grad()
def fused_grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together: pass 1 of a step with clipping or a loss scale.

    Args:
        grads: dense tensors of one device; float32, bfloat16, float16 or float64, mixed freely,
            any strides. May be empty.

    Returns:
        float64, 0-dimensional: inf or NaN exactly where an element is (or where the norm itself
        passes float64). On the CPU summed in float64 over fixed chunks: the same bits at every
        thread count and instruction set.

    Raises:
        ValueError: sparse gradients, or several devices.
        TypeError: a dtype that is not served.
    """
    lists.tensors("grads", grads, grads, checks.FLOATING)
    for i, grad in enumerate(grads):
        if grad.device != grads[0].device:
            raise ValueError(f"grads[{i}]: expected device {grads[0].device}; got {grad.device}")
    if not grads:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return norm_op(grads)  # type: ignore[no-any-return]


@torch.no_grad()
def fused_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    grad_factor: float = 1.0,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    streams: Sequence[int] = (),
    seed: int = 0,
    rounding_step: int = 0,
    places: Sequence[tuple[int, int, int]] = (),
    norm: Tensor | None = None,
    clip_norm: float = math.inf,
) -> None:
    """One AdamW step (decoupled weight decay, arXiv 1711.05101) of many tensors, in place.

    Lists hold one tensor for each parameter, of its shape; any strides; empty tensors do nothing.
    The arithmetic is float32, for float64 parameters float64. Nothing changes when it raises.

    Args:
        params: float32, bfloat16, float16 or float64, mixed freely; one device.
        grads: float64 where the parameter is, else float32, bfloat16 or float16.
        exp_avgs, exp_avg_sqs: float32 (float64 for float64 parameters), or uint8 codes of the
            dynamic map (arXiv 2110.02861), contiguous, with ``exp_avg_scales``.
        steps: float32, one element, on the CPU for CPU parameters, elsewhere on the CPU or the
            device of params; incremented here.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        decoupled: False adds weight_decay times the parameter to the gradient, as torch.optim.Adam.
        grad_factor: gradients are multiplied by it first: the inverse loss scale times the
            clipping factor.
        exp_avg_scales, exp_avg_sq_scales: float32 absmax of states of uint8, empty tensors for the
            others; may be left out where no state is uint8. Of a shape ``[*rows, ceil(row /
            256)]``: the first dimensions are the parameter's, the others together one row, whose
            elements share an absmax by 256. ``[ceil(numel / 256)]`` takes all as one row.
        copies: bfloat16 or float16, written with the new parameter rounded to nearest (the model's
            weights where params are float32 masters); empty tensors, or left out, for none.
        streams: one number for each parameter: bfloat16 parameters are then rounded
            stochastically by Philox of (seed, stream, rounding_step, element index), the same bits
            at every thread count. Left out: to nearest.
        places: of parts of larger tensors (first, run, stride): element i is element ``first + i
            // run * stride + i % run`` of the whole, whose random bits it takes.
        seed, rounding_step: see streams; rounding_step must differ from step to step.
        norm: float64 0-dimensional, `fused_grad_norm` of grads: nothing changes where it is inf or
            NaN. The CUDA C++ kernels read it on the device where steps are there too, so that
            norm and step can be captured in one CUDA graph; others wait for it.
        clip_norm: with norm: grads times grad_factor whose norm is past it are brought down to it,
            as torch.nn.utils.clip_grad_norm_ does.

    Raises:
        ValueError: lists of other lengths, shapes, devices, or sparse tensors; clip_norm not above
            0, or one without a norm.
        TypeError: dtypes that are not served.
    """
    lists.step_lists(params, grads, copies, streams, places)
    lists.check_norm(norm, clip_norm, params)
    lists.moments("exp_avgs", exp_avgs, exp_avg_scales, params)
    lists.moments("exp_avg_sqs", exp_avg_sqs, exp_avg_sq_scales, params)
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} tensors as params has; got {len(steps)}")
    for i, counter in enumerate(steps):
        if counter.dtype != torch.float32:
            checks.dtype(f"steps[{i}]", counter, torch.float32)
        if counter.numel() != 1:
            raise ValueError(f"steps[{i}]: expected one element; got shape {list(counter.shape)}")
    for i, (m, v) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if v.dtype != m.dtype:
            checks.dtype(f"exp_avg_sqs[{i}]", v, m.dtype)
    if not params:
        return
    step = AdamWStep(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        exp_avg_scales,
        exp_avg_sq_scales,
        copies,
        lr,
        *betas,
        eps,
        weight_decay,
        decoupled,
        maximize,
        grad_factor,
        streams,
        seed,
        rounding_step,
        *transposed(places),
    )
    if norm is not None and cuda.counts(params, steps):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            cuda.adamw(step, norm, clip_norm)
        count_versions(adamw_op, step)
        return
    if norm is not None:
        if not norm.isfinite():
            return
        clipped = min(1.0, clip_norm / (float(norm) * abs(grad_factor) + 1e-6))
        step = step._replace(grad_factor=grad_factor * clipped)
    step_adamw(*step)


@torch.no_grad()
def fused_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first_step: bool = False,
    maximize: bool = False,
    grad_factor: float = 1.0,
    momentum_scales: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    streams: Sequence[int] = (),
    seed: int = 0,
    rounding_step: int = 0,
    places: Sequence[tuple[int, int, int]] = (),
) -> None:
    """One SGD step of many tensors, in place; the update of torch.optim.SGD.

    Args:
        params, grads, maximize, grad_factor, copies, streams, seed, rounding_step, places: as for
            `fused_adamw`.
        momentum_buffers: float32 (float64 for float64 parameters) or uint8 codes with
            ``momentum_scales``; needed where momentum is not 0.
        lr, momentum, dampening, weight_decay (coupled), nesterov: as in torch.optim.SGD.
        first_step: the buffers hold nothing yet and become the gradient.

    Raises:
        ValueError: lists of other lengths, shapes, devices, or sparse tensors.
        TypeError: dtypes that are not served.
    """
    lists.step_lists(params, grads, copies, streams, places)
    if momentum != 0 or momentum_buffers:
        lists.moments("momentum_buffers", momentum_buffers, momentum_scales, params)
    if params:
        step_sgd(
            params,
            grads,
            momentum_buffers,
            momentum_scales,
            copies,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            first_step,
            maximize,
            grad_factor,
            streams,
            seed,
            rounding_step,
            *transposed(places),
        )
