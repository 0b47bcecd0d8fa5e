"""sparse_linear (1x4 blocks, int8 or fp32) against dense, dense int8 and torch's CSR.

The weights are pruned first, and every error is against the float64 product with the pruned
weights: what pruning itself costs belongs to a receipt, not to a kernel. A limit counts the
useful work only, that of the blocks kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.benches import families, rivals
from bigops.benches.harness import (
    DTYPES,
    OWN,
    Case,
    Side,
    copies,
    in_turn,
)
from bigops.benches.limits import Cost
from bigops.ops.sparse_linear import SparseWeight, block_mask, sparsify_weight


def cases() -> list[Case]:
    """The demo's layers, and 4096x4096 from DRAM, at several sparsities."""

    def case(name: str, m: int, k: int, n: int, sparsity: float, **more: Any) -> Case:
        params = {
            "activation": more.pop("activation", "none"),
            "sparsity": sparsity,
            "values": more.pop("values", "int8"),
        }
        return Case("sparse_linear", name, m, k, n, "fp32", params=params, **more)

    found = [
        case("overhead80", 8, 8, 8, 0.8, activation="relu", quick=True),
        case("mlp80", 64, 784, 2048, 0.8, activation="relu", quick=True),
        case("mlp2-80", 64, 2048, 1024, 0.8, activation="relu", quick=True),
        case("mlp80-fp32", 64, 784, 2048, 0.8, activation="relu", values="fp32"),
        case("mlp90", 64, 784, 2048, 0.9, activation="relu"),
    ]
    for percent in (50, 80, 90):
        found += [
            case(f"square{percent}", m, 4096, 4096, percent / 100, rotate=True)
            for m in (1, 16, 128)
        ]
    found += [
        case("square90-fp32", m, 4096, 4096, 0.9, values="fp32", rotate=True) for m in (1, 128)
    ]
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    sparsity, int8 = float(case.params["sparsity"]), case.params["values"] == "int8"
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = torch.randn(case.n, case.k, device=device) * case.k**-0.5
    mask = block_mask(weight, sparsity)
    weight = (weight * mask.repeat_interleave(4, dim=1)[:, : case.k]).to(dtype)
    bias = torch.randn(case.n, device=device).to(dtype)
    own = sparsify_weight(weight, mask, int8)
    size, moved = x.element_size(), x.element_size() * case.m * (case.k + case.n)
    total = 2.0 * case.m * case.k * case.n
    sparse = Cost("int8" if int8 else "fp32", total * own.density, float(own.nbytes + moved))
    dense = Cost(case.dtype, total, float(size * case.n * case.k + moved))
    plain = rivals.eager(activation, False)
    reference = [plain(x.double().cpu(), weight.double().cpu(), bias.double().cpu())]
    take = in_turn(copies(case, own, own.nbytes, _copy))
    sides = [
        Side(OWN, lambda: bigops.sparse_linear(x, take(), bias, None, activation), sparse),
        rivals.eager_side(case, x, weight, (bias,), plain, dense),
        rivals.dense_compiled(case, x, weight, bias, plain, dense),
    ]
    if device == "cpu":
        sides += families.sparse_fp32_sides(case, x, weight, bias, activation)
        sides += families.dense_fp32_sides(case, x, weight, bias, activation)
        sides += families.dense_int8_sides(case, x, weight, bias, activation)
    return reference, sides


def _copy(weight: SparseWeight) -> SparseWeight:
    return weight._replace(
        values=weight.values.clone(),
        index=weight.index.clone(),
        panel_ptr=weight.panel_ptr.clone(),
        scale=None if weight.scale is None else weight.scale.clone(),
    )


def test_sparse_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
