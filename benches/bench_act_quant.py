"""act_quant against the same rule in eager torch and compiled by inductor.

What is compared are the numbers that the u8 stand for, with x itself as the truth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bigops
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side
from bigops.benches.limits import Cost
from bigops.formats.quantize import act_quant

SIZES = ((1, 4096), (16, 4096), (64, 384), (512, 384), (512, 1536), (1024, 768), (1024, 3072))


def cases() -> list[Case]:
    """Rows of decode steps and of encoders in fp32, and in bf16."""
    return [
        Case("act_quant", "rows", m, k, k, dtype, quick=(m, k) == (512, 384))
        for dtype in ("fp32", "bf16")
        for m, k in SIZES
    ]


def _shown(rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    values, scale, zero_point = rows
    return (values.float() - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)


def _plain(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, scale, zero_point = act_quant(x)
    return q.to(torch.uint8), scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    x = torch.randn(case.m, case.k, device=device).to(DTYPES[case.dtype])
    cost = Cost("fp32", 6.0 * x.numel(), float(x.nbytes + x.numel() + 8 * case.m))
    sides = [
        Side(OWN, lambda: bigops.act_quant(x), cost, shown=_shown),
        Side("eager", lambda: _plain(x), cost, "aten", shown=_shown),
    ]
    ready = rivals.compiled(_plain)
    sides.append(Side("torch.compile", lambda: ready(x), cost, "inductor", shown=_shown))
    return [x.double().cpu()], sides


def test_act_quant(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
