"""The path from fp8_linear and its backward to Triton kernels: flat rows, names what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.fp8 import Fp8Weight
from bigops.ops import targets
from bigops.ops.family import Call


def name(call: Call, weight: Fp8Weight) -> str:
    """The kernel's name, as `backend.record` gives it."""
    return f"triton.fp8_linear.{checks.short(call.x.dtype)}.{'f8a8' if weight.rounds else 'f8'}"


def _form(weight: Fp8Weight) -> dict[str, Any]:
    form = {"scales": weight.scales, "activations": weight.activations}
    return {**weight.tensors(), **form}


def forward(call: Call) -> Tensor:
    """`kernels/fp8_linear.py` forward on x of any rank."""
    from bigops.kernels.fp8_linear import forward as kernels

    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, Fp8Weight)
    added = None if residual is None else rows(residual)
    y = kernels.forward(
        rows(x), **_form(weight), bias=call.bias, residual=added, activation=call.code
    )
    backend.note(name(call, weight))
    return y.view(*x.shape[:-1], weight.n)


def backward(grad: Tensor, call: Call, need_x: bool, need_bias: bool) -> tuple[Tensor, ...]:
    """Gradients of x and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32 and as the forward saw it: where that rounds x,
    the gradient is the straight-through one.
    """
    from bigops.kernels.fp8_linear import forward as fp8_linear
    from bigops.kernels.fp8_linear import gradient as fp8_gradient
    from bigops.kernels.fused_linear import preact_gradient

    x, weight = call.x, call.weight
    assert isinstance(weight, Fp8Weight)
    flat, z = rows(grad), None
    if call.activation != "none":
        z = fp8_linear.forward(rows(x), **_form(weight), bias=call.bias, dtype=torch.float32)
    gz, gb = preact_gradient(flat, z, call.code, z is not None and need_x, need_bias)
    gx = x.new_empty(0)
    if need_x:
        stored = (weight.values, weight.scale, weight.k, weight.scales)
        gx = fp8_gradient.gradient(flat if gz is None else gz, *stored).view(x.shape)
    backend.note(f"triton.fp8_linear_backward.{checks.short(x.dtype)}")
    return gx, x.new_empty(0) if gb is None else gb


def said(call: Call, weight: Fp8Weight, target: targets.Target) -> tuple[str, dict[str, Any]]:
    """(reason, config) on ``target``."""
    from bigops.kernels.fp8_linear import forward as kernels

    form = (weight.n, weight.k, weight.activations)
    config, reason = kernels.explain(targets.present(target), call.x.dtype, call.rows, *form)
    return reason, config
