"""Calls with qparams or a u8 x: what they refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.ops.family.u8_cases import (
    ONE_OF_EACH,
    X_QPARAMS,
    call,
    qparams_of,
    raw,
    raw_arguments,
)
from tests.support.cases.compressed import make
from tests.support.kernels_ran import expect, needs_extension

pytestmark = needs_extension


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("path", ["public", "raw", "functorch", "compiled"])
@pytest.mark.parametrize("name", ["x", "bias", "residual", "y_qparams"])
def test_what_wants_a_gradient_is_refused(form: str, path: str, name: str) -> None:
    case = make(form, 3, 5, 4)
    given = {
        "x": case.x,
        "bias": case.bias,
        "residual": case.residual,
        "y_qparams": qparams_of(case),
    }

    def f(t: Tensor) -> Tensor:
        now: dict[str, Any] = {**given, name: t}
        case.bias, case.residual = now["bias"], now["residual"]
        if path == "raw":
            y: Tensor = raw(case)(*raw_arguments(case, now["x"], now["y_qparams"]))
            return y
        return call(case, now["x"], now["y_qparams"])

    t = given[name]
    assert t is not None
    if path == "functorch":
        go: Any = torch.func.grad(lambda t: f(t).float().sum())
    else:
        torch._dynamo.reset()
        go = torch.compile(f, backend="aot_eager") if path == "compiled" else f
    with pytest.raises(Exception, match=f"{name}: expected a tensor that needs no gradient"):
        go(t if path == "functorch" else t.clone().requires_grad_())
    with torch.no_grad(), expect("_u8"):
        f(t.clone().requires_grad_())


# errors, explain ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "change", "kind", "message"),
    [
        (
            "int8_static",
            {"y_qparams": torch.ones(3)},
            ValueError,
            r"qparams: expected shape \[2\]",
        ),
        (
            "int8_static",
            {"y_qparams": torch.ones(2).double()},
            TypeError,
            "y_qparams: expected dty",
        ),
        (
            "int8_static",
            {"y_qparams": torch.tensor([0.0, 1.0])},
            ValueError,
            "y_qparams: expected a",
        ),
        ("int8_static", {"y_qparams": torch.tensor([1.0, 0.5])}, ValueError, "got 1.0, 0.5"),
        ("int8_static", {"y_qparams": torch.tensor([1.0, 256.0])}, ValueError, "got 1.0, 256.0"),
        ("int8_static", {"y_qparams": torch.tensor([torch.nan, 1.0])}, ValueError, "got nan, 1.0"),
        ("int8_static", {"y_qparams": torch.tensor([1e-40, 1.0])}, ValueError, "a finite scale"),
        (
            "int8_static",
            {"y_qparams": [1.0, 0.0]},
            TypeError,
            "y_qparams: expected a torch.Tensor",
        ),
        ("int8_static", {"x": torch.zeros(3, 5).byte()}, ValueError, r"x: expected shape \[.., 4"),
        ("int8_static", {"x": torch.zeros(3, 4).char()}, TypeError, "x: expected dtype .* int8"),
        (
            "int8_static",
            {"x": torch.zeros(3, 4).byte(), "residual": torch.zeros(3, 5).half()},
            TypeError,
            "residual: expected dtype float32; got float16",
        ),
        (
            "int8_static",
            {"x": torch.zeros(3, 4).byte(), "bias": torch.zeros(5).double()},
            TypeError,
            "bias: expected dtype .*; got float64",
        ),
        (
            "int8",
            {"x": torch.zeros(3, 4).byte()},
            TypeError,
            "x: expected a floating dtype, since the weight's activations are not 'static'",
        ),
        ("sparse_int8", {"x": torch.zeros(3, 4).byte()}, TypeError, "since there is no x_qparams"),
        (
            "sparse_float",
            {"x_qparams": X_QPARAMS},
            ValueError,
            "x_qparams: expected None with",
        ),
        ("sparse_float", {"x": torch.zeros(3, 4).byte()}, TypeError, "has floating values"),
        (
            "sparse_int8",
            {"x_qparams": torch.ones(1)},
            ValueError,
            r"qparams: expected shape \[2\]",
        ),
        (
            "sparse_int8",
            {"x_qparams": torch.tensor([-1.0, 3.0])},
            ValueError,
            "x_qparams: expected a f",
        ),
        (
            "sparse_int8",
            {"y_qparams": X_QPARAMS.to("meta")},
            ValueError,
            "y_qparams: expected device",
        ),
    ],
)
def test_errors_name_argument_expected_and_got(
    form: str, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    case = make(form, 3, 5, 4)
    f: Any = sparse_linear if case.sparse else quantized_linear
    given = {
        "x": case.x,
        "bias": case.bias,
        "residual": case.residual,
        "y_qparams": X_QPARAMS,
        **change,
    }
    with pytest.raises(kind, match=message):
        f(given.pop("x"), case.weight, **given)


@pytest.mark.parametrize(
    ("form", "place", "value", "message"),
    [
        ("int8_static", -4, torch.ones(3), r"qparams: expected shape \[2\]"),
        ("int8_static", -4, torch.tensor([0.0, 1.0]), "y_qparams: expected a finite scale"),
        ("int8_static", -4, torch.ones(2).double(), "y_qparams: expected dtype f32"),
        ("int8_static", 5, torch.tensor([1.0, -1.0]), "x_qparams: expected a finite scale"),
        ("int8", 0, torch.zeros(3, 4).byte(), "x: expected a floating dtype without x_qparams"),
        ("sparse_int8", 0, torch.zeros(3, 4).byte(), "x: expected a floating dtype without"),
        ("sparse_float", -5, X_QPARAMS, "x_qparams: expected None with floating values"),
        ("int8_static", -1, "swiglu", "activation: expected one that is no gated pair"),
    ],
)
def test_raw_op_checks_again(form: str, place: int, value: Any, message: str) -> None:
    case = make(form, 3, 5, 4)
    args = raw_arguments(case, case.x, X_QPARAMS)
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        raw(case)(*args)
