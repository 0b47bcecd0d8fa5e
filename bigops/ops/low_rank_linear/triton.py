"""The road from low_rank_linear to its Triton kernel: flattens rows, names what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.library import rows
from bigops.ops.targets import present


def why_not(dtype: torch.dtype, target: targets.Target) -> str:
    """The reason why no Triton kernel serves such a call on ``target``; empty where one does."""
    return targets.why_not(dtype, target, "low_rank_linear")


def serves(dtype: torch.dtype, target: targets.Target) -> bool:
    """Whether the Triton kernels serve such a call on ``target``."""
    return not why_not(dtype, target)


def _name(op: str, dtype: torch.dtype, form: str) -> str:
    return f"triton.{op}.{checks.short(dtype)}.{form}"


def forward(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    base: Tensor | None,
    activation: str,
    scale: float,
    with_parts: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`kernels/low_rank_linear/kernel.py` forward on x of any rank: (y, t, z), None if not asked.

    The name ends in "fused", or in "composed" where t went through memory.
    """
    from bigops.kernels.low_rank_linear import kernel as kernels

    y, t, z, form = kernels.forward(
        rows(x),
        u,
        v,
        bias,
        None if residual is None else rows(residual),
        base,
        act.CODES[activation],
        scale,
        with_parts,
    )
    backend.note(_name("low_rank_linear", x.dtype, form))
    lead = x.shape[:-1]
    return (
        y.view(*lead, y.shape[-1]),
        None if t is None else t.view(*lead, t.shape[-1]),
        None if z is None else z.view(*lead, z.shape[-1]),
    )


def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    t: Tensor,
    preact: Tensor | None,
    activation: str,
    scale: float,
    need_x: bool,
    need_u: bool,
    need_v: bool,
    need_bias: bool,
    need_base: bool,
) -> tuple[Tensor, ...]:
    """`kernels/low_rank_linear/kernel.py` backward on x of any rank; [0] for what is not needed."""
    from bigops.kernels.low_rank_linear import kernel as kernels

    gx, *others, form = kernels.backward(
        rows(grad),
        rows(x),
        u,
        v,
        base,
        rows(t),
        None if preact is None else rows(preact),
        act.CODES[activation],
        scale,
        need_x,
        need_u,
        need_v,
        need_bias,
        need_base,
    )
    backend.note(_name("low_rank_linear_backward", x.dtype, form or "products"))
    return (gx.view(x.shape) if need_x else gx, *others)


def explain(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, rank: int, based: bool
) -> tuple[str, dict[str, Any], str]:
    """(kernel, config, reason) on ``target`` ("cuda", "sm_90", "gfx942" ...)."""
    from bigops.kernels.low_rank_linear import model

    form, config, reason = model.explain(present(target), dtype, m, n, k, rank, based)
    return _name("low_rank_linear", dtype, form), config, reason
