"""The path from low_rank_linear to its Triton kernel: flattens rows, names what ran."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.dense import Factors
from bigops.ops.family import Call
from bigops.ops.targets import Target, present


def name(call: Call, form: str, suffix: str = "") -> str:
    """The kernel as it is recorded; it ends in "fused", or "composed" where t goes to memory."""
    return f"triton.low_rank_linear{suffix}.{checks.short(call.x.dtype)}.{form}"


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`kernels/low_rank_linear/kernel.py` forward on x of any rank: (y, t, z), None if not kept."""
    from bigops.kernels.low_rank_linear import kernel as kernels

    x, weight, bias, residual, _ = call
    assert isinstance(weight, Factors)
    y, t, z, form = kernels.forward(
        rows(x),
        weight.u,
        weight.v,
        bias,
        None if residual is None else rows(residual),
        weight.base,
        call.code,
        weight.scale,
        keep,
    )
    backend.note(name(call, form))
    lead = x.shape[:-1]
    return (
        y.view(*lead, y.shape[-1]),
        None if t is None else t.view(*lead, t.shape[-1]),
        None if z is None else z.view(*lead, z.shape[-1]),
    )


def backward(
    grad: Tensor,
    call: Call,
    t: Tensor,
    preact: Tensor | None,
    need_x: bool,
    need_u: bool,
    need_v: bool,
    need_base: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """`kernels/low_rank_linear/kernel.py` backward on x of any rank; [0] for what is not needed."""
    from bigops.kernels.low_rank_linear import kernel as kernels

    x, weight = call.x, call.weight
    assert isinstance(weight, Factors)
    gx, gu, gv, gb, gbase, form = kernels.backward(
        rows(grad),
        rows(x),
        weight.u,
        weight.v,
        weight.base,
        rows(t),
        None if preact is None or call.activation == "none" else rows(preact),
        call.code,
        weight.scale,
        need_x,
        need_u,
        need_v,
        need_bias,
        need_base,
    )
    backend.note(name(call, form or "products", "_backward"))
    return gx.view(x.shape) if need_x else gx, gu, gv, gbase, gb


def form(call: Call, target: Target) -> str:
    """How a call runs on ``target``: "fused" or "composed"."""
    return _explained(call, target)[0]


def said(call: Call, target: Target) -> tuple[str, dict[str, Any]]:
    """(reason, config) on ``target``."""
    _, config, reason = _explained(call, target)
    return reason, config


def _explained(call: Call, target: Target) -> tuple[str, dict[str, Any], str]:
    from bigops.kernels.low_rank_linear import model

    weight = call.weight
    assert isinstance(weight, Factors)
    sizes = (call.rows, weight.n, weight.k, weight.rank, weight.base is not None)
    return model.explain(present(target), call.x.dtype, *sizes)
