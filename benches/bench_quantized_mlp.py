"""An MLP block in static int8: what it is worth that its products pass u8 to each other.

A case has m rows, hidden size k and n features inside: Linear, gelu, Linear. Both of ours run the
same two products by the same qparams; one stores u8 between them (``y_qparams`` of the op), the
other, the layers of a model, floats that the second quantises again. The range of every activation
is recorded from the float32 model on the case's own input, the best calibration there can be, for
all sides alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bigops.benches import rivals_openvino
from bigops.benches.bench_bert_layer import _compiled, _dynamic, _wide
from bigops.benches.harness import OWN, Case, Side, optional_side
from bigops.benches.limits import Cost
from bigops.nn import QuantLinear
from bigops.ops.quantized_linear import quantized_linear

ROWS = (16, 128, 1024)
FLOATS = f"{OWN} floats between"


def cases() -> list[Case]:
    """BERT-base's block at three numbers of rows, and one so small that calls are all of it."""

    def case(name: str, m: int, k: int, n: int, quick: bool) -> Case:
        return Case("quantized_mlp", name, m, k, n, params={"activation": "gelu"}, quick=quick)

    return [
        case("mlp-overhead", 8, 8, 8, True),
        *(case("mlp", m, 768, 3072, m == ROWS[0]) for m in ROWS),
    ]


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    with torch.inference_mode(False), torch.no_grad():  # no parameters of inference tensors
        model = nn.Sequential(nn.Linear(case.k, case.n), nn.GELU(), nn.Linear(case.n, case.k))
        model = model.to(device).eval().requires_grad_(False)
        x = torch.randn(case.m, case.k, device=device)
        weights = 2 * case.k * case.n

        def cost(unit: str, size: float, between: int) -> Cost:
            """``between``: bytes of a number that is written and read between the layers."""
            moved = 4.0 * case.m * 2 * case.k + 2.0 * between * case.m * case.n
            return Cost(unit, 2.0 * case.m * weights, size * weights + moved)

        floats = static_block(model, x)
        ours = u8_between(*floats)
        sides = [
            Side(OWN, lambda: ours(x), cost("int8", 1, 1)),
            Side(FLOATS, lambda: floats(x), cost("int8", 1, 4)),
            Side("eager", lambda: model(x), cost("fp32", 4, 4), "aten"),
            _compiled(model, x, cost("fp32", 4, 4)),
        ]
        if device == "cpu":
            dynamic = _dynamic(model)
            price = cost("int8", 1, 4)
            sides.append(Side("torch int8", lambda: dynamic(x), price, "quantize_dynamic"))
            spans = [(float(t.min()), float(t.max())) for t in (x, model[:2](x))]
            optional_side(sides, rivals_openvino.mlp_static, model, x, spans, cost("int8", 1, 1))
        return [_wide(model, x)], sides


def static_block(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """The block in static int8, gelu in the epilogue."""
    first = QuantLinear.from_linear(copy.deepcopy(model[0]), "gelu", activations="static")
    second = QuantLinear.from_linear(copy.deepcopy(model[2]), activations="static")
    first.calibrate(x)
    second.calibrate(model[:2](x))
    return nn.Sequential(first.freeze(), second.freeze()).eval()


def u8_between(first: QuantLinear, second: QuantLinear) -> Callable[[Tensor], Tensor]:
    """The same products on the same storage, u8 between them."""
    up, down = first.storage(), second.storage()

    def run(x: Tensor) -> Tensor:
        u8 = quantized_linear(x, up, first.bias, activation="gelu", y_qparams=second.x_qparams)
        return quantized_linear(u8, down, second.bias)

    return run


def test_quantized_mlp(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
