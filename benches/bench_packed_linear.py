"""packed_linear against eager torch, torch.compile and all dense rivals: inference of a layer.

Cases ``nn.*`` call whole layers at 1 to 64 rows: as `bigops.pack_` leaves them, unpacked (what a
drop-in gives that nobody packed) and as plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigops
from bigops.benches import families, rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side, clones, copies, in_turn
from bigops.benches.limits import Cost
from bigops.formats.packed import PackedWeight
from bigops.nn import (
    GatedMLP,
    Linear,
    LowRankLinear,
    PackedGatedMLP,
    PackedLinear,
    PackedLowRankLinear,
)

CPU_ONLY = "packed_linear: a layout for CPUs; on a GPU fused_linear serves"
ROWS = (1, 4, 16, 64, 256, 1024)
LAYERS = ((768, 3072), (1024, 1024), (4096, 4096), (4096, 11008))  # (K, N)
MODULES = {"Linear": (768, 3072), "GatedMLP": (1024, 2816), "LowRankLinear": (1024, 1024)}


def cases() -> list[Case]:
    """A tiny layer, four layers by six numbers of rows in fp32 and bf16, two of them in fp16; the
    modules by four.
    """
    tiny = {"activation": "none"}
    found = [Case("packed_linear", "overhead", 8, 8, 8, "fp32", params=tiny, quick=True)]
    for dtype in ("fp32", "bf16", "fp16"):
        for k, n in LAYERS if dtype != "fp16" else LAYERS[::2]:
            for m in ROWS:
                gelu = (k, n) == (768, 3072)
                found.append(
                    Case(
                        "packed_linear",
                        "layer" if gelu else "grid",
                        m,
                        k,
                        n,
                        dtype,
                        params={"activation": "gelu" if gelu else "none"},
                        rotate=k * n >= 4096 * 4096,  # smaller weights stay in the cache
                        quick=(m, k, n) == (16, 768, 3072),
                    )
                )
        for kind, (k, n) in MODULES.items() if dtype != "fp16" else ():
            for m in ROWS[:4]:
                quick = (kind, m, dtype) == ("Linear", 16, "fp32")
                params = {"module": kind}
                found.append(
                    Case("packed_linear", f"nn.{kind}", m, k, n, dtype, params=params, quick=quick)
                )
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    if "module" in case.params:
        return _modules(case, device)
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = (torch.randn(case.n, case.k, device=device) * case.k**-0.5).to(dtype)
    bias = torch.randn(case.n, device=device).to(dtype)
    size = x.element_size()
    moved = float(size * (case.n * case.k + case.m * (case.k + case.n)))
    # fp16 is multiplied in fp32
    unit = "fp32" if case.dtype == "fp16" else case.dtype
    cost = Cost(unit, 2.0 * case.m * case.k * case.n, moved)
    plain = rivals.eager(activation, False)
    reference = [plain(*(t.detach().double().cpu() for t in (x, weight, bias)))]
    own = PackedWeight.from_dense(weight)
    take_own = in_turn(copies(case, own, own.nbytes, _copy))
    take_plain, take = in_turn(clones(case, weight)), in_turn(clones(case, weight))
    sides = [
        Side(OWN, lambda: bigops.packed_linear(x, take_own(), bias, None, activation), cost),
        Side(
            "bigops unpacked",
            lambda: bigops.fused_linear(x, take_plain(), bias, None, activation),
            cost,
        ),
        rivals.eager_side(case, x, weight, (bias,), plain, cost),
        rivals.compiled_side(plain, lambda f: f(x, take(), bias), cost),
    ]
    if device != "cpu":
        return reference, sides
    if case.dtype == "fp32":
        sides += families.dense_fp32_sides(case, x, weight, bias, activation)
    elif case.dtype == "bf16":
        sides += families.dense_bf16_sides(case, x, weight, bias, activation)
    return reference, sides


def _modules(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """A layer packed, as a drop-in, and in plain torch; the same weights."""
    with torch.inference_mode(False), torch.no_grad():  # no Parameters of inference tensors
        where: dict[str, Any] = {"device": device, "dtype": DTYPES[case.dtype]}
        layer: nn.Module
        packed: nn.Module
        plain: Callable[..., Tensor]
        if case.params["module"] == "Linear":
            layer = Linear(case.k, case.n, activation="gelu", **where)
            packed, plain = PackedLinear.from_linear(layer).freeze(), _plain_linear
        elif case.params["module"] == "GatedMLP":
            layer = GatedMLP(case.k, case.n, **where)
            packed, plain = PackedGatedMLP.from_mlp(layer), _plain_mlp
        else:
            layer = LowRankLinear(case.k, case.n, case.k // 4, **where)
            packed, plain = PackedLowRankLinear.from_low_rank(layer).freeze(), _plain_low_rank
        x = torch.randn(case.m, case.k, device=device).to(DTYPES[case.dtype])
        weights = [p.detach() for p in layer.parameters()]
        entries = sum(w.numel() for w in weights if w.dim() == 2)
        moved = x.element_size() * (entries + case.m * (case.k + case.n))
        cost = Cost(case.dtype, 2.0 * case.m * entries, float(moved))
        reference = [plain(*(t.double().cpu() for t in (x, *weights)))]
    return reference, [
        Side(OWN, lambda: packed(x), cost),
        Side("bigops unpacked", lambda: layer(x), cost),
        Side("eager", lambda: plain(x, *weights), cost, "aten"),
        rivals.compiled_side(plain, lambda f: f(x, *weights), cost),
    ]


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _plain_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _plain_low_rank(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, v), u, bias)


def _copy(weight: PackedWeight) -> PackedWeight:
    return weight.replace(panels=weight.panels.clone())


def test_packed_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
