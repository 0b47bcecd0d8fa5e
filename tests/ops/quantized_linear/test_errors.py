"""quantized_linear: what the public function refuses, and the raw op for direct callers."""

from __future__ import annotations

import pytest
import torch

from bigops.formats.quantized import QuantizedWeight
from bigops.ops.codes import code_of
from bigops.ops.library import encoder
from bigops.ops.quantized_linear import quantized_linear
from tests.support.kernels_ran import needs_extension

raw = torch.ops.bigops.quantized_linear
pytestmark = needs_extension


# errors ------------------------------------------------------------------------------------


def refusals() -> list[tuple[str, type[Exception], str, dict[str, object]]]:
    good = QuantizedWeight.from_dense(torch.randn(5, 4))
    return [
        (
            "activation",
            ValueError,
            "activation: expected one of none, .*; got 'swiglu'",
            {"activation": "swiglu"},
        ),
        (
            "x dtype",
            TypeError,
            "x: expected dtype float32, bfloat16, float16; got float64",
            {"x": torch.randn(3, 4).double()},
        ),
        ("x is no tensor", TypeError, "x: expected a torch.Tensor; got list", {"x": [1.0]}),
        (
            "x columns",
            ValueError,
            r"x: expected shape \[.., 4\] .*; got \[3, 7\]",
            {"x": torch.randn(3, 7)},
        ),
        (
            "x columns of the padding",
            ValueError,
            r"x: expected shape \[.., 4\] .*; got \[3, 3\]",
            {"x": torch.randn(3, 3)},
        ),
        ("x scalar", ValueError, r"x: expected shape .*; got \[\]", {"x": torch.tensor(1.0)}),
        (
            "values dtype",
            TypeError,
            "values: expected dtype int8; got float32",
            {"weight": good.replace(values=good.values.float())},
        ),
        (
            "scale shape",
            ValueError,
            r"scale: expected shape \[1, 16\]; got \[1, 4\]",
            {"weight": good.replace(scale=good.scale[:, :4])},
        ),
        (
            "row_sum",
            ValueError,
            "row_sum: expected a tensor with activations 'dynamic'; got None",
            {"weight": good.replace(row_sum=None)},
        ),
        (
            "x_qparams",
            ValueError,
            "x_qparams: expected a tensor with activations 'static'; got None",
            {"weight": good.replace(activations="static")},
        ),
        (
            "group",
            ValueError,
            "group: expected None, 32, 64 or 128; got 48",
            {"weight": good.replace(group=48)},
        ),
        (
            "weight device",
            ValueError,
            "values: expected device cpu, that of x; got meta",
            {"weight": good.map(lambda t: t.to("meta"))},
        ),
        (
            "bias shape",
            ValueError,
            r"bias: expected shape \[5\]; got \[4\]",
            {"bias": torch.randn(4)},
        ),
        (
            "bias dtype",
            TypeError,
            "bias: expected dtype float32, that of x; got float64",
            {"bias": torch.randn(5).double()},
        ),
        (
            "residual shape",
            ValueError,
            r"residual: expected shape \[3, 5\]; got \[1, 5\]",
            {"residual": torch.randn(1, 5)},
        ),
    ]


@pytest.mark.parametrize("graph", [False, True], ids=["inference", "graph"])
@pytest.mark.parametrize(
    ("kind", "message", "change"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()]
)
def test_errors_name_argument_expected_and_got(
    kind: type[Exception], message: str, change: dict[str, object], graph: bool
) -> None:
    arguments: dict[str, object] = {
        "x": torch.randn(3, 4),
        "weight": QuantizedWeight.from_dense(torch.randn(5, 4)),
        "residual": torch.randn(3, 5).requires_grad_(graph),
    }
    arguments.update(change)
    if "x" in change:
        arguments.pop("residual")
    with pytest.raises(kind, match=message):
        quantized_linear(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(3, 7)}, "x: expected shape"),
        ({1: torch.zeros(1, 1, 16, 4)}, "values: expected dtype s8"),
        ({1: torch.zeros(1, 2, 16, 4).char()}, r"values: expected shape \[1, 1, 16, 4\]"),
        ({1: torch.tensor(1).char()}, "pad: expected the rows"),
        ({2: torch.ones(3)}, "scale: expected shape"),
        ({3: torch.ones(3).char()}, "zero_point: expected shape"),
        ({4: None}, "row_sum: expected a tensor; got None"),
        ({5: torch.ones(2)}, "x_qparams: expected None; got a tensor"),
        ({6: 16}, "pad: expected the rows"),
        ({7: -1}, "k: expected at least 0"),
        ({8: 3}, "bits: expected 8 or 4"),
        ({9: 32}, "group: expected 0 with int8 activations"),
        ({10: 99}, "activations: expected a code from 0 to 3"),
        ({11: torch.ones(3)}, "bias: expected shape"),
        ({12: torch.ones(1, 5)}, "residual: expected x's shape"),
        ({13: code_of("activation", "swiglu")}, "activation: expected one that is no gated pair"),
    ],
)
def test_raw_op_checks_again(change: dict[int, object], message: str) -> None:
    weight = QuantizedWeight.from_dense(torch.randn(5, 4))
    args = encoder(raw.code)([torch.randn(3, 4), *weight.arguments, None, None, "none"])
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        raw.code(*args)
