"""The road from fp8_linear and its backward to Triton kernels: flat rows, names what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.fp8 import Fp8Weight
from bigops.ops import activation as act
from bigops.ops.library import rows


def name(dtype: torch.dtype, activations: str) -> str:
    """The kernel's name, as `backend.record` gives it."""
    numbers = "f8" if activations == "none" else "f8a8"
    return f"triton.fp8_linear.{checks.short(dtype)}.{numbers}"


def forward(x: Tensor, *args: Any) -> Tensor:
    """`kernels/fp8_linear/forward.py` forward on x of any rank; the arguments of the op."""
    from bigops.kernels.fp8_linear import forward as kernels

    *fixed, bias, residual, activation = args
    weight = Fp8Weight(*fixed)
    y = kernels.forward(
        rows(x),
        weight.values,
        weight.scale,
        weight.x_scale,
        weight.scales,
        weight.activations,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
    )
    backend.note(name(x.dtype, weight.activations))
    return y.view(*x.shape[:-1], weight.n)


def backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32 and as the forward saw it: where that rounds x,
    the gradient is the straight-through one.
    """
    from bigops.kernels.fp8_linear import forward as fp8_linear
    from bigops.kernels.fp8_linear import gradient as fp8_gradient
    from bigops.kernels.fused_linear import preact_gradient

    *fixed, bias, activation, need_x, need_bias = args
    weight = Fp8Weight(*fixed)
    flat, z = rows(grad), None
    if activation != "none":
        form = (weight.values, weight.scale, weight.x_scale, weight.scales, weight.activations)
        z = fp8_linear.forward(rows(x), *form, bias, dtype=torch.float32)
    gz, gb = preact_gradient(flat, z, act.CODES[activation], z is not None and need_x, need_bias)
    gx = x.new_empty(0)
    if need_x:
        stored = (weight.values, weight.scale, weight.k, weight.scales)
        gx = fp8_gradient.gradient(flat if gz is None else gz, *stored).view(x.shape)
    backend.note(f"triton.fp8_linear_backward.{checks.short(x.dtype)}")
    return gx, x.new_empty(0) if gb is None else gb


def explain(
    target: str, dtype: torch.dtype, m: int, weight: Fp8Weight
) -> tuple[str, dict[str, Any], str]:
    """(kernel, config, reason) on ``target`` ("cuda", "sm_90", "gfx942" ...)."""
    from bigops.kernels.fp8_linear import forward as kernels

    config, reason = kernels.explain(target, dtype, m, weight.n, weight.k, weight.activations)
    return name(dtype, weight.activations), config, reason
