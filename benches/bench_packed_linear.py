"""packed_linear against eager torch, torch.compile and all dense rivals: inference of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bigops
from bigops.benches import families, rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side, clones, copies, in_turn
from bigops.benches.limits import Cost
from bigops.ops.packed_linear import PackedWeight, pack_weight

CPU_ONLY = "packed_linear: a layout for CPUs; on a GPU fused_linear serves"
ROWS = (1, 4, 16, 64, 256, 1024)
LAYERS = ((768, 3072), (1024, 1024), (4096, 4096), (4096, 11008))  # (K, N)


def cases() -> list[Case]:
    """A tiny layer, four layers by six numbers of rows in fp32 and bf16, two of them in fp16."""
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
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
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
    own = pack_weight(weight)
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


def _copy(weight: PackedWeight) -> PackedWeight:
    return weight._replace(panels=weight.panels.clone())


def test_packed_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
