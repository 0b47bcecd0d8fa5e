"""Optimiser steps and the norm of gradients in plain torch: of one tensor, and of lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.ops.fused_adamw import states


def reference_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else "cpu")
    for grad in grads:
        total = total + grad.double().square().sum()
    return total.sqrt()


def _read(state: Tensor, scales: Tensor | None, signed: bool) -> Tensor:
    return state.clone() if scales is None else states.decode(state, scales, signed)


def _write(state: Tensor, scales: Tensor | None, value: Tensor, signed: bool) -> None:
    if scales is None:
        state.copy_(value)
    else:
        codes, new = states.encode(value, signed, scales.ndim - 1)
        state.copy_(codes)
        scales.copy_(new)


Place = tuple[int, int, int]
"""First, run and stride of a part of a tensor, see `fused_adamw`."""
Random = tuple[int, int, int] | tuple[int, int, int, Place | None]
"""Seed, stream and step of stochastic rounding, and the place of a part."""


def _write_parameter(
    param: Tensor, value: Tensor, copy: Tensor | None, random: Random | None
) -> None:
    if random is not None and param.dtype == torch.bfloat16:
        param.copy_(states.round_stochastic(value, *random))
    else:
        param.copy_(value)
    if copy is not None:
        copy.copy_(value)


def reference_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    copy: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
    random: Random | None = None,
    decoupled: bool = True,
) -> None:
    """One tensor's AdamW step in plain torch, in place (arXiv 1711.05101, algorithm 2).

    ``random`` is (seed, stream, step[, place]) of stochastic rounding, or None for to nearest.
    """
    step += 1
    n = float(step)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    g = grad.to(wide) * grad_factor
    if weight_decay != 0 and not decoupled:
        g = g + weight_decay * param.to(wide)
    keep = 1 - lr * weight_decay if decoupled else 1.0
    m = _read(exp_avg, exp_avg_scale, True)
    v = _read(exp_avg_sq, exp_avg_sq_scale, False)
    m = m + (1 - beta1) * (g - m)
    v = v * beta2 + ((1 - beta2) * g) * g  # g * g is inf past 1.8e19, where v still has room
    denominator = v.sqrt() * (1 / math.sqrt(1 - beta2**n)) + eps
    p = param.to(wide) * keep - lr / (1 - beta1**n) * (m / denominator)
    _write(exp_avg, exp_avg_scale, m, True)
    _write(exp_avg_sq, exp_avg_sq_scale, v, False)
    _write_parameter(param, p, copy, random)


def reference_sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    momentum_scale: Tensor | None,
    copy: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first_step: bool,
    grad_factor: float,
    random: Random | None = None,
) -> None:
    """One tensor's SGD step in plain torch, in place; the update of torch.optim.SGD."""
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    p = param.to(wide)
    g = grad.to(wide) * grad_factor
    if weight_decay != 0:
        g = g + weight_decay * p
    if momentum != 0:
        assert momentum_buffer is not None
        m = g
        if not first_step:
            m = momentum * _read(momentum_buffer, momentum_scale, True) + (1 - dampening) * g
        g = g + momentum * m if nesterov else m
        _write(momentum_buffer, momentum_scale, m, True)
    _write_parameter(param, p - lr * g, copy, random)


def _pick(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    """The i-th tensor of an optional list; a list may be empty, and hold empty tensors."""
    return tensors[i] if len(tensors) and tensors[i].numel() else None


def _scale(scales: Sequence[Tensor], held: Sequence[Tensor], i: int) -> Tensor | None:
    """Scales of the i-th state; None where it holds floats, as that of a float64 parameter does."""
    coded = len(held) and held[i].dtype == torch.uint8
    return _pick(scales, i) if coded else None


def _factor(step: Any) -> float:
    return -step.grad_factor if step.maximize else step.grad_factor  # type: ignore[no-any-return]


def adamw_numbers(step: Any) -> tuple[float, float, float, float, float, float]:
    """lr, beta1, beta2, eps, weight_decay, and the gradients' factor, below 0 to maximise."""
    return step.lr, step.beta1, step.beta2, step.eps, step.weight_decay, _factor(step)


def places(step: Any) -> list[Place | None]:
    """Of each parameter, None for a whole one."""
    if not len(step.runs):
        return [None] * len(step.params)
    return list(zip(step.firsts, step.runs, step.strides, strict=True))


def sgd_numbers(step: Any) -> tuple[float, float, float, float, bool, bool, float]:
    """lr, momentum, dampening, weight_decay, nesterov, first_step, and the factor, likewise."""
    numbers = step.lr, step.momentum, step.dampening, step.weight_decay
    return *numbers, step.nesterov, step.first_step, _factor(step)


def _random(step: Any, i: int) -> Random | None:
    if not len(step.streams):
        return None
    return step.seed, step.streams[i], step.rounding_step, places(step)[i]


def adamw(step: Any) -> None:
    """The op `fused_adamw`, by its `schema.AdamWStep`."""
    backend.note("reference.fused_adamw")
    for i, param in enumerate(step.params):
        reference_adamw(
            param,
            step.grads[i],
            step.exp_avgs[i],
            step.exp_avg_sqs[i],
            step.steps[i],
            _scale(step.exp_avg_scales, step.exp_avgs, i),
            _scale(step.exp_avg_sq_scales, step.exp_avg_sqs, i),
            _pick(step.copies, i),
            *adamw_numbers(step),
            _random(step, i),
            step.decoupled,
        )


def sgd(step: Any) -> None:
    """The op `fused_sgd`, by its `schema.SGDStep`."""
    backend.note("reference.fused_sgd")
    for i, param in enumerate(step.params):
        reference_sgd(
            param,
            step.grads[i],
            step.momentum_buffers[i] if len(step.momentum_buffers) else None,
            _scale(step.momentum_scales, step.momentum_buffers, i),
            _pick(step.copies, i),
            *sgd_numbers(step),
            _random(step, i),
        )


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The op `fused_grad_norm`."""
    backend.note("reference.fused_grad_norm")
    return reference_norm(grads)
