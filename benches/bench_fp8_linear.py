"""fp8_linear against dense layers and torch's own fp8 product, by what shares a scale.

Errors are against the float64 product with the original weights, so a row shows what its
provider's number format costs. torch's product is `torch._scaled_mm`, on a GPU that multiplies
e4m3; its rows of x are rounded by plain torch. On the CPU our side is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, OWN, Case, LeftOut, Side, copies, in_turn, optional_side
from bigops.benches.limits import Cost
from bigops.formats import fp8
from bigops.formats.fp8 import Fp8Weight

ROWS = (1, 16, 256, 4096)
LAYERS = ((4096, 4096), (4096, 11008), (7168, 2048))  # (K, N)
# What `Fp8Weight.from_dense` is given.
FORMATS: dict[str, dict[str, Any]] = {
    "row": {},
    "tensor": {"scales": "tensor"},
    "block": {"scales": "block"},
    "weight": {"activations": "none"},
}


def cases() -> list[Case]:
    """Each format on three layers by four numbers of rows, and small ones for `--quick`."""

    def case(name: str, m: int, k: int, n: int, dtype: str, form: str, **more: Any) -> Case:
        params = {"form": form, "activation": "none", "bias": True}
        return Case("fp8_linear", name, m, k, n, dtype, params=params, **more)

    found = [case("row-layer", 16, 768, 1024, "fp32", "row", quick=True)]
    found += [case(f"{form}-layer", 16, 768, 1024, "bf16", form, quick=True) for form in FORMATS]
    return found + [
        case(f"{form}-grid", m, k, n, "bf16", form, rotate=True)
        for form in FORMATS
        for k, n in LAYERS
        for m in ROWS
    ]


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = (torch.randn(case.n, case.k, device=device) * case.k**-0.5).to(dtype)
    bias = torch.randn(case.n, device=device).to(dtype)
    own = Fp8Weight.from_dense(weight, **FORMATS[str(case.params["form"])])
    flops = 2.0 * case.m * case.k * case.n
    moved = x.element_size() * case.m * (case.k + case.n)
    dense = Cost(case.dtype, flops, float(x.element_size() * case.n * case.k + moved))
    # on the CPU the reference multiplies in float32
    cost = Cost("fp32" if device == "cpu" else case.dtype, flops, float(own.nbytes + moved))
    plain = rivals.eager(activation, False)
    reference = [plain(x.double().cpu(), weight.double().cpu(), bias.double().cpu())]

    take_own = in_turn(copies(case, own, own.nbytes, _copy))
    sides = [
        Side(OWN, lambda: bigops.fp8_linear(x, take_own(), bias, None, activation), cost),
        rivals.eager_side(case, x, weight, (bias,), plain, dense),
        rivals.dense_compiled(case, x, weight, bias, plain, dense),
    ]
    optional_side(sides, _scaled_mm, case, x, weight, bias, cost)
    return reference, sides


def _scaled_mm(case: Case, x: Tensor, weight: Tensor, bias: Tensor, cost: Cost) -> Side:
    """`torch._scaled_mm` with a scale for each row of x and of W, or one for each of both."""
    form = str(case.params["form"])
    if form not in ("row", "tensor"):
        raise LeftOut(f"torch._scaled_mm is left out of the cases with scales by {form}")
    if x.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise LeftOut("torch._scaled_mm is left out: it needs a GPU of capability 8.9 or later")
    own = Fp8Weight.from_dense(weight, form)
    take = in_turn(copies(case, own, own.nbytes, _copy))

    def rounded() -> tuple[Tensor, Tensor]:
        largest = x.abs().amax(1, keepdim=True) if form == "row" else x.abs().amax()
        scale = (largest.float() / fp8.LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        return fp8.to_codes(x / scale), scale

    def call() -> Tensor:
        q, scale = rounded()
        other = take()
        by = other.scale.t() if form == "row" else other.scale.view(())
        return torch._scaled_mm(
            q, other.values.t(), scale, by, bias, out_dtype=x.dtype, use_fast_accum=False
        )

    return Side("torch._scaled_mm", call, cost)


def _copy(weight: Fp8Weight) -> Fp8Weight:
    return weight.map(Tensor.clone)


def test_fp8_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
