"""quantized_linear (int8 weights, dynamic int8 activations) against dense and torch's int8.

Every error is against the float64 product with the original weights, so a row shows what its
provider's number format costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.benches import families, rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side, copies, in_turn
from bigops.benches.limits import Cost
from bigops.ops.quantized_linear import QuantizedWeight, quantize_weight


def cases() -> list[Case]:
    """The demo's layers, a transformer's, and 4096x4096 from DRAM."""

    def case(name: str, m: int, k: int, n: int, dtype: str = "fp32", **more: Any) -> Case:
        params = {"activation": more.pop("activation", "gelu"), "bias": True}
        return Case("quantized_linear", name, m, k, n, dtype, params=params, **more)

    found = [case("overhead", 8, 8, 8, activation="relu", quick=True)]
    for dtype in ("fp32", "bf16"):
        found += [
            case("mlp", 64, 784, 2048, dtype, activation="relu", quick=True),
            case("mlp2", 64, 2048, 1024, dtype, activation="relu", quick=dtype == "fp32"),
            case("ffn", 16, 768, 3072, dtype),
            case("ffn", 128, 768, 3072, dtype),
        ]
        found += [
            case("square", m, 4096, 4096, dtype, activation="none", rotate=True)
            for m in (1, 16, 64, 256)
        ]
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = (torch.randn(case.n, case.k, device=device) * case.k**-0.5).to(dtype)
    bias = torch.randn(case.n, device=device).to(dtype)
    flops = 2.0 * case.m * case.k * case.n
    moved = x.element_size() * case.m * (case.k + case.n)
    int8 = Cost("int8", flops, float(case.n * case.k + moved))
    dense = Cost(case.dtype, flops, float(x.element_size() * case.n * case.k + moved))
    plain = rivals.eager(activation, False)
    reference = [plain(x.double().cpu(), weight.double().cpu(), bias.double().cpu())]

    own = quantize_weight(weight)
    take_own = in_turn(copies(case, own, own.nbytes, _copy))
    sides = [
        Side(OWN, lambda: bigops.quantized_linear(x, take_own(), bias, None, activation), int8),
        rivals.eager_side(case, x, weight, (bias,), plain, dense),
        rivals.dense_compiled(case, x, weight, bias, plain, dense),
    ]
    if device == "cpu":
        if case.dtype == "fp32":
            sides += families.dense_fp32_sides(case, x, weight, bias, activation)
        else:
            sides += families.dense_bf16_sides(case, x, weight, bias, activation)
        sides += families.dense_int8_sides(case, x, weight, bias, activation)
    return reference, sides


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(*(part.clone() for part in weight))


def test_quantized_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
