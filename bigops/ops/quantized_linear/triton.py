"""The path from quantized_linear and its backward to Triton kernels: flat rows, names what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.quantized import QuantizedWeight
from bigops.ops import targets
from bigops.ops.family import Call

MAX_K = 2**17  # that of kernels/quantized_linear.py, which only a machine with triton can import


def why_not(call: Call, weight: QuantizedWeight, target: targets.Target) -> str:
    """The reason why no Triton kernel serves such a call on ``target``; empty where one does."""
    if weight.rounds and weight.k >= MAX_K:
        return (
            f"no Triton kernel for {weight.k} columns: sums past {MAX_K - 1} may not fit in int32"
        )
    return targets.why_not(call.x.dtype, target, "quantized_linear")


def name(call: Call, weight: QuantizedWeight) -> str:
    """The kernel's name, as `backend.record` gives it."""
    numbers = f"w{weight.bits}" + ("a8" if weight.rounds else "")
    return f"triton.quantized_linear.{checks.short(call.x.dtype)}.{numbers}"


def _form(weight: QuantizedWeight) -> dict[str, Any]:
    """The weight as the forward kernel takes it: all of it but K."""
    form = {field: getattr(weight, field) for field in ("n", "bits", "group", "activations")}
    return {**weight.tensors(), **form}


def forward(call: Call) -> Tensor:
    """`kernels/quantized_linear.py` forward on x of any rank."""
    from bigops.kernels.quantized_linear import forward as kernels

    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, QuantizedWeight)
    y = kernels.forward(
        rows(x),
        **_form(weight),
        bias=call.bias,
        residual=None if residual is None else rows(residual),
        activation=call.code,
    )
    backend.note(name(call, weight))
    return y.view(*x.shape[:-1], weight.n)


def backward(grad: Tensor, call: Call, need_x: bool, need_bias: bool) -> tuple[Tensor, ...]:
    """Gradients of x and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32 and as the forward saw it: where that rounds x,
    the gradient is the straight-through one.
    """
    from bigops.kernels.fused_linear import preact_gradient
    from bigops.kernels.quantized_linear import forward as quantized_linear
    from bigops.kernels.quantized_linear import gradient as quantized_gradient

    x, weight = call.x, call.weight
    assert isinstance(weight, QuantizedWeight)
    flat, z = rows(grad), None
    if call.activation != "none":
        z = quantized_linear.forward(rows(x), **_form(weight), bias=call.bias, dtype=torch.float32)
    gz, gb = preact_gradient(flat, z, call.code, z is not None and need_x, need_bias)
    gx = x.new_empty(0)
    if need_x:
        gz = flat if gz is None else gz
        stored = (weight.values, weight.scale, weight.zero_point)
        form = (weight.k, weight.bits, weight.group)
        gx = quantized_gradient.gradient(gz, *stored, *form).view(x.shape)
    backend.note(f"triton.quantized_linear_backward.{checks.short(x.dtype)}.w{weight.bits}")
    return gx, x.new_empty(0) if gb is None else gb


def said(call: Call, weight: QuantizedWeight, target: targets.Target) -> tuple[str, dict[str, Any]]:
    """(reason, config) on ``target``."""
    from bigops.kernels.quantized_linear import forward as kernels

    form = (weight.bits, weight.group, weight.activations)
    arch = target if isinstance(target, str) else targets.present(target)
    config, reason = kernels.explain(arch, call.x.dtype, call.rows, weight.n, weight.k, *form)
    return reason, config
