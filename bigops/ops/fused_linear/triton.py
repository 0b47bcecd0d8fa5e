"""The path from fused_linear to the Triton kernels: flattens rows, names what ran."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.dense import DenseWeight
from bigops.ops.family import Call
from bigops.ops.targets import Target, present


def name(call: Call, suffix: str = "") -> str:
    """The kernel as it is recorded."""
    return f"triton.fused_linear{suffix}.{checks.short(call.x.dtype)}"


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """`kernels/fused_linear.py` forward on x of any rank: (y, z or None)."""
    from bigops.kernels import fused_linear as kernels

    x, weight, bias, residual, activation = call
    assert isinstance(weight, DenseWeight)
    y, z = kernels.forward(
        rows(x),
        weight.weight,
        bias,
        None if residual is None else rows(residual),
        call.code,
        keep and activation != "none",
    )
    backend.note(name(call))
    lead = x.shape[:-1]
    return y.view(*lead, y.shape[-1]), None if z is None else z.view(*lead, z.shape[-1])


def backward(
    grad: Tensor,
    call: Call,
    preact: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels/fused_linear.py` backward on x of any rank; [0] for what is not needed."""
    from bigops.kernels import fused_linear as kernels

    x, weight = call.x, call.weight
    assert isinstance(weight, DenseWeight)
    gx, gw, gb = kernels.backward(
        rows(grad),
        rows(x),
        weight.weight,
        None if preact is None or call.activation == "none" else rows(preact),
        call.code,
        need_x,
        need_weight,
        need_bias,
    )
    backend.note(name(call, "_backward"))
    return gx.view(x.shape) if need_x else gx, gw, gb


def said(call: Call, target: Target) -> tuple[str, dict[str, Any]]:
    """(reason, config) on ``target``."""
    from bigops.kernels import fused_linear as kernels

    given = (call.x.dtype, call.rows, *call.weight.shape, call.code)
    config, reason = kernels.explain(present(target), *given)
    return reason, config
