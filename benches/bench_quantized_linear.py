"""quantized_linear against dense layers and torch's own quantised ones, format by format.

int8 and W4A8 errors are against the float64 product with the original weights, so a row shows what
its provider's number format costs. Weight-only int4 is held to the product with the rounded
weights, which all int4 sides share: what is left is the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.benches import families, rivals, rivals_cuda
from bigops.benches.harness import DTYPES, OWN, Case, Side, copies, in_turn
from bigops.benches.limits import Cost
from bigops.formats.quantized import QuantizedWeight

ROWS = (1, 4, 16, 64, 128, 256, 1024)
LAYERS = ((768, 3072), (1024, 1024), (4096, 4096), (4096, 11008))  # (K, N)
# What `QuantizedWeight.from_dense` is given, and the dtypes of x that the format is measured with.
FORMATS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "int8": ({}, ("fp32", "bf16")),
    "w4": ({"bits": 4, "group": 64}, ("bf16", "fp32")),
    "w4a8": ({"bits": 4, "group": 64, "activations": "dynamic"}, ("fp32",)),
    "w8": ({"group": 64}, ("bf16",)),
}


def cases() -> list[Case]:
    """The demo's layers, and each format on four layers by seven numbers of rows."""

    def case(name: str, m: int, k: int, n: int, dtype: str, form: str, **more: Any) -> Case:
        params = {"form": form, "activation": more.pop("activation", "none"), "bias": True}
        return Case("quantized_linear", name, m, k, n, dtype, params=params, **more)

    found = [case("int8-overhead", 8, 8, 8, "fp32", "int8", activation="relu", quick=True)]
    for dtype in ("fp32", "bf16"):
        found += [
            case("int8-mlp", 64, 784, 2048, dtype, "int8", activation="relu", quick=True),
            case("int8-mlp2", 64, 2048, 1024, dtype, "int8", activation="relu"),
            case("int8-ffn", 16, 768, 3072, dtype, "int8", activation="gelu"),
        ]
    for form, (_, dtypes) in FORMATS.items():
        for dtype in dtypes:
            found += [
                case(
                    f"{form}-grid",
                    m,
                    k,
                    n,
                    dtype,
                    form,
                    rotate=k * n >= 4096 * 4096,  # smaller weights stay in the cache
                    quick=form != "int8" and (m, n) == (16, 3072) and dtype == dtypes[0],
                )
                for k, n in LAYERS
                for m in ROWS
            ]
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    form = str(case.params["form"])
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = (torch.randn(case.n, case.k, device=device) * case.k**-0.5).to(dtype)
    bias = torch.randn(case.n, device=device).to(dtype)
    own = QuantizedWeight.from_dense(weight, **FORMATS[form][0])
    if own.activations == "none":
        weight = own.to_dense(dtype)
    flops = 2.0 * case.m * case.k * case.n
    moved = x.element_size() * case.m * (case.k + case.n)
    dense = Cost(case.dtype, flops, float(x.element_size() * case.n * case.k + moved))
    unit = "int8" if own.activations != "none" else case.dtype
    plain = rivals.eager(activation, False)
    reference = [plain(x.double().cpu(), weight.double().cpu(), bias.double().cpu())]

    take_own = in_turn(copies(case, own, own.nbytes, _copy))
    sides = [
        Side(
            OWN,
            lambda: bigops.quantized_linear(x, take_own(), bias, None, activation),
            Cost(unit, flops, float(own.nbytes + moved)),
        ),
        rivals.eager_side(case, x, weight, (bias,), plain, dense),
        rivals.dense_compiled(case, x, weight, bias, plain, dense),
    ]
    if device == "cpu":
        if own.bits == 4:
            rounded = own.codes()
            same = rivals.Int4Weight(rounded.q.to(torch.int8), rounded.scale.float())
            sides += families.int4_sides(case, x, same, bias, activation)
        else:
            sides += families.dense_int8_sides(case, x, weight, bias, activation)
        return reference, sides
    layer = rivals.Layer(case, x, weight, bias, activation)
    if own.bits == 8:
        return reference, sides + rivals_cuda.int8_sides(layer)
    rounded = own.codes()
    same = rivals.Int4Weight(rounded.q.to(torch.int8), rounded.scale.float())
    sides += rivals_cuda.int4_sides(layer, same)
    return reference, sides


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.map(Tensor.clone)


def test_quantized_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
