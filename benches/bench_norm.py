"""Layer norm and RMS norm against torch's own: eager, compiled; with a residual, with u8 behind.

A case is m rows of width k. "residual" adds one tensor before the norm, as a transformer that norms
after its layers has it, "sum" gives the sum, too, as one that norms before them needs it; "u8"
quantises each row, and its sides are compared by what the numbers stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, EAGER, OWN, Case, Side
from bigops.benches.limits import Cost
from bigops.formats.quantize import act_quant

EPS = 1e-5


def cases() -> list[Case]:
    """Overhead, MiniLM's rows, BERT's, and those of a Llama-like one."""

    def case(name: str, m: int, k: int, dtype: str = "fp32", *, quick: bool = False) -> Case:
        return Case("norm", name, m, k, k, dtype, quick=quick)

    return [
        case("overhead", 1, 8, quick=True),
        case("layer", 1, 384),
        case("layer", 512, 384, quick=True),
        case("layer", 512, 384, "bf16"),
        case("layer-residual", 512, 384),
        case("layer-residual", 1024, 768),
        case("layer-residual", 1024, 768, "bf16"),
        case("layer-residual-u8", 512, 384),
        case("layer-residual-u8", 1024, 768),
        case("rms", 256, 576),
        case("rms", 256, 576, "bf16"),
        case("rms-sum", 256, 576),
        case("rms-sum", 256, 576, "bf16"),
        case("rms-sum-u8", 256, 576),
    ]


Results = Tensor | tuple[Any, ...]  # what is not kept is None


def eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, name: str
) -> Results:
    """As a user writes it: the norm, or its u8; with the sum where the case is of it."""
    v = x if residual is None else x + residual
    k = [x.shape[-1]]
    y = F.rms_norm(v, k, weight, EPS) if "rms" in name else F.layer_norm(v, k, weight, bias, EPS)
    found = quantised(y) if "u8" in name else (y,)
    return (*found, v) if "sum" in name else found if "u8" in name else y


def quantised(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as u8 in plain torch."""
    rows = act_quant(y)
    return rows.q.to(torch.uint8), rows.scale.squeeze(-1), rows.zero_point.squeeze(-1).int()


def own(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, name: str
) -> Results:
    """The same by our ops."""
    kind = "rms" if "rms" in name else "layer"
    options: dict[str, Any] = {"eps": EPS, "kind": kind}
    if "u8" in name:
        return bigops.norm_act_quant(x, weight, bias, residual, **options, keep_sum="sum" in name)
    if "sum" in name:
        return bigops.norm_with_sum(x, weight, bias, residual, **options)
    return bigops.norm(x, weight, bias, residual, **options)


def norm_of(found: Results) -> Tensor:
    """What of a side's results is compared: y, or what its u8 stands for."""
    if isinstance(found, Tensor):
        return found
    first, *others = found
    if first.dtype != torch.uint8:
        return first
    scale, zero_point, *_ = others
    return (first.float() - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype = DTYPES[case.dtype]
    has_residual = "residual" in case.name or "sum" in case.name

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight = tensor(case.m, case.k), tensor(case.k)
    bias = None if "rms" in case.name else tensor(case.k)
    residual = tensor(case.m, case.k) if has_residual else None
    given = (x, weight, bias, residual)
    rows = 2 + has_residual + ("sum" in case.name)
    unit = "int8" if "u8" in case.name else case.dtype
    cost = Cost(unit, 0.0, float(rows * x.numel() * x.element_size()))
    wide: list[Any] = [None if t is None else t.double().cpu() for t in given]
    truth = norm_of(eager(*wide, case.name.replace("-u8", "")))  # type: ignore[call-arg]

    def side(provider: str, function: Callable[..., Results], kernel: str = "") -> Side:
        return Side(provider, lambda: function(*given, case.name), cost, kernel, shown=norm_of)  # type: ignore[arg-type, return-value]

    sides = [side(OWN, own), side(EAGER, eager, "aten")]
    return [truth], [*sides, side("torch.compile", rivals.compiled(eager), "inductor")]


def test_norm(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
