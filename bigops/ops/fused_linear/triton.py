"""The road from fused_linear to the Triton kernels: flattens rows, names what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops import activation as act
from bigops.ops.library import rows


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    with_preact: bool,
) -> tuple[Tensor, Tensor | None]:
    """`kernels/fused_linear.py` forward on x of any rank: (y, z or None)."""
    from bigops.kernels import fused_linear as kernels

    flat = rows(x)
    y, z = kernels.forward(
        flat,
        weight,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
        with_preact,
    )
    backend.note(f"triton.fused_linear.{checks.short(x.dtype)}")
    lead = x.shape[:-1]
    return y.view(*lead, y.shape[-1]), None if z is None else z.view(*lead, z.shape[-1])


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    preact: Tensor | None,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels/fused_linear.py` backward on x of any rank; [0] for what is not needed."""
    from bigops.kernels import fused_linear as kernels

    flat_grad, flat_x = rows(grad), rows(x)
    gx, gw, gb = kernels.backward(
        flat_grad,
        flat_x,
        weight,
        None if preact is None else rows(preact),
        act.CODES[activation],
        need_x,
        need_weight,
        need_bias,
    )
    backend.note(f"triton.fused_linear_backward.{checks.short(x.dtype)}")
    return gx.view(x.shape) if need_x else gx, gw, gb


def explain(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, activation: str
) -> tuple[str, dict[str, Any], str]:
    """(kernel, config, reason) on ``target`` ("cuda", "sm_90", "gfx942" ...); n: weight rows."""
    from bigops.kernels import fused_linear as kernels

    config, reason = kernels.explain(target, dtype, m, n, k, act.CODES[activation])
    return f"triton.fused_linear.{checks.short(dtype)}", config, reason
