"""The road from quantized_linear and its backward to Triton kernels: flat rows, names what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.quantized import QuantizedWeight
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.library import rows

MAX_K = 2**17  # that of kernels/quantized_linear, which only a machine with triton can import


def why_not(dtype: torch.dtype, k: int, activations: str, target: targets.Target) -> str:
    """The reason why no Triton kernel serves such a call on ``target``; empty where one does."""
    if dtype == torch.uint8:
        return "no Triton kernel for a uint8 x"
    if activations != "none" and k >= MAX_K:
        return f"no Triton kernel for {k} columns: sums past {MAX_K - 1} may not fit in int32"
    return targets.why_not(dtype, target, "quantized_linear")


def serves(dtype: torch.dtype, k: int, activations: str, target: targets.Target) -> bool:
    """Whether the Triton kernels serve such a call on ``target``."""
    return not why_not(dtype, k, activations, target)


def name(dtype: torch.dtype, bits: int, activations: str) -> str:
    """The kernel's name, as `backend.record` gives it."""
    numbers = f"w{bits}" + ("" if activations == "none" else "a8")
    return f"triton.quantized_linear.{checks.short(dtype)}.{numbers}"


def _form(weight: QuantizedWeight) -> dict[str, Any]:
    """The weight as the forward kernel takes it: all of it but K."""
    return {name: t for name, t in weight._asdict().items() if name != "k"}


def forward(x: Tensor, *args: Any) -> Tensor:
    """`kernels/quantized_linear/forward.py` forward on x of any rank; the arguments of the op."""
    from bigops.kernels.quantized_linear import forward as kernels

    *fixed, bias, residual, activation = args
    weight = QuantizedWeight.of(*fixed)
    y = kernels.forward(
        rows(x),
        **_form(weight),
        bias=bias,
        residual=None if residual is None else rows(residual),
        activation=act.CODES[activation],
    )
    backend.note(name(x.dtype, weight.bits, weight.activations))
    return y.view(*x.shape[:-1], weight.n)


def backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32 and as the forward saw it: where that rounds x,
    the gradient is the straight-through one.
    """
    from bigops.kernels.fused_linear import preact_gradient
    from bigops.kernels.quantized_linear import forward as quantized_linear
    from bigops.kernels.quantized_linear import gradient as quantized_gradient

    *fixed, bias, activation, need_x, need_bias = args
    weight = QuantizedWeight.of(*fixed)
    flat, z = rows(grad), None
    if activation != "none":
        z = quantized_linear.forward(rows(x), **_form(weight), bias=bias, dtype=torch.float32)
    code = act.CODES[activation]
    gz, gb = preact_gradient(flat, z, code, z is not None and need_x, need_bias)
    gx = x.new_empty(0)
    if need_x:
        gz = flat if gz is None else gz
        stored = (weight.values, weight.scale, weight.zero_point)
        form = (weight.k, weight.bits, weight.group)
        gx = quantized_gradient.gradient(gz, *stored, *form).view(x.shape)
    backend.note(f"triton.quantized_linear_backward.{checks.short(x.dtype)}.w{weight.bits}")
    return gx, x.new_empty(0) if gb is None else gb


def explain(
    target: str, dtype: torch.dtype, m: int, weight: QuantizedWeight
) -> tuple[str, dict[str, Any], str]:
    """(kernel, config, reason) on ``target`` ("cuda", "sm_90", "gfx942" ...)."""
    from bigops.kernels.quantized_linear import forward as kernels

    form = (weight.bits, weight.group, weight.activations)
    config, reason = kernels.explain(target, dtype, m, weight.n, weight.k, *form)
    return name(dtype, weight.bits, weight.activations), config, reason
