"""low_rank_linear against two plain products and against the best dense product of its dtype.

The dense sides hold a dense weight of the same size: they compute another layer, and each is
checked against its own truth. ``params`` gives the rank and the ideal ratio of operations,
K N / (r (K + N)), which a dense side's ratio is to be read against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.benches import families, rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side, clones, copies, in_turn
from bigops.benches.limits import Cost
from bigops.formats.packed import PackedWeight
from bigops.ops.packed_linear import packed_linear

ROWS = (1, 16, 128, 1024)
LAYERS = ((768, 3072), (1024, 1024), (4096, 4096))  # (K, N)
SHARES = (0.1, 0.25)  # of the smaller side


def cases() -> list[Case]:
    """A tiny layer; three layers by two ranks by four numbers of rows, in fp32 and bf16."""
    tiny = {"activation": "none", "rank": 2, "ideal": 2.0}
    found = [Case("low_rank_linear", "overhead", 8, 8, 8, "fp32", params=tiny, quick=True)]
    for dtype in ("fp32", "bf16"):
        for k, n in LAYERS:
            for share in SHARES:
                rank = round(share * min(k, n))
                ideal = round(k * n / (rank * (k + n)), 2)
                for m in ROWS:
                    found.append(
                        Case(
                            "low_rank_linear",
                            f"layer r={share}",
                            m,
                            k,
                            n,
                            dtype,
                            params={"activation": "none", "rank": rank, "ideal": ideal},
                            rotate=k * n >= 4096 * 4096,
                            quick=(m, k, n, share) == (16, 768, 3072, 0.1),
                        )
                    )
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    rank = min(int(case.params["rank"]), case.n, case.k)
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    u = (torch.randn(case.n, rank, device=device) * rank**-0.5).to(dtype)
    v = (torch.randn(rank, case.k, device=device) * case.k**-0.5).to(dtype)
    weight = (torch.randn(case.n, case.k, device=device) * case.k**-0.5).to(dtype)
    bias = torch.randn(case.n, device=device).to(dtype)
    x64, u64, v64, w64, b64 = (t.double().cpu() for t in (x, u, v, weight, bias))
    reference = [F.linear(F.linear(x64, v64), u64, b64)]
    size = x.element_size()

    def cost(entries: int) -> Cost:
        moved = float(size * (entries + case.m * (case.k + case.n)))
        return Cost(case.dtype, 2.0 * case.m * entries, moved)

    def plain(a: Tensor, first: Tensor, second: Tensor, offset: Tensor) -> Tensor:
        return F.linear(F.linear(a, first), second, offset)

    low = cost(rank * (case.k + case.n))
    factors = [(in_turn(clones(case, u)), in_turn(clones(case, v))) for _ in range(3)]
    (own_u, own_v), (eager_u, eager_v), (compiled_u, compiled_v) = factors
    sides = [
        Side(OWN, lambda: bigops.low_rank_linear(x, own_u(), own_v(), bias), low),
        Side("eager", lambda: plain(x, eager_v(), eager_u(), bias), low, "aten"),
        rivals.compiled_side(plain, lambda f: f(x, compiled_v(), compiled_u(), bias), low),
    ]
    if device != "cpu":
        full, truth = cost(case.k * case.n), [F.linear(x64, w64, b64)]
        take_dense = in_turn(clones(case, weight))
        cublas = Side("dense", lambda: F.linear(x, take_dense(), bias), full, "cublas")
        return reference, [*sides, dataclasses.replace(cublas, reference=truth)]
    packs = [
        in_turn(copies(case, p, p.nbytes, _copy))
        for p in (PackedWeight.from_dense(u), PackedWeight.from_dense(v))
    ]

    def packed() -> Tensor:
        return packed_linear(packed_linear(x, packs[1]()), packs[0](), bias)

    sides.insert(1, Side("bigops packed", packed, low))
    full, truth = cost(case.k * case.n), [F.linear(x64, w64, b64)]
    own = PackedWeight.from_dense(weight)
    take = in_turn(copies(case, own, own.nbytes, _copy))
    dense = [Side("bigops dense packed", lambda: packed_linear(x, take(), bias), full)]
    family = families.dense_fp32_sides if case.dtype == "fp32" else families.dense_bf16_sides
    dense += family(case, x, weight, bias, activation)
    sides += [
        dataclasses.replace(side, provider=f"dense {side.provider}", reference=truth)
        for side in dense
    ]
    return reference, sides


def _copy(weight: PackedWeight) -> PackedWeight:
    return weight.replace(panels=weight.panels.clone())


def test_low_rank_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
