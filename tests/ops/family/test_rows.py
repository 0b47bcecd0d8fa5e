"""Quantised rows as x: quantized_linear and sparse_linear behind one act_quant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops import QuantizedRows, act_quant
from bigops.formats.quantize import static_qparams
from bigops.ops.family import RowsOp
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.support import paths
from tests.support.cases.compressed import Case, make
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, threads

pytestmark = needs_extension
FORMS = ("int8", "int8_zero", "int8_symmetric", "w4a8", "w4a8_zero", "sparse_int8")
ONE_OF_EACH = ("int8", "w4a8", "sparse_int8")


def rows_of(case: Case) -> QuantizedRows:
    return act_quant(case.x, getattr(case.weight, "activations", "dynamic") == "symmetric")


def call(case: Case, rows: QuantizedRows, **qparams: Tensor) -> Tensor:
    f: Any = sparse_linear if case.sparse else quantized_linear
    y: Tensor = f(rows, case.weight, case.bias, case.residual, case.name, **qparams)
    return y


def rows_op(case: Case) -> RowsOp:
    found = case.linear_op.rows
    assert found is not None
    return found


def raw_arguments(case: Case, rows: QuantizedRows) -> list[Any]:
    return [*rows, *case.storage, case.bias, case.residual, case.name]


def run(form: str, m: int, n: int, k: int, dtype: str, name: str, **more: Any) -> None:
    case = make(form, m, n, k, dtype, name, **more)
    rows = rows_of(case)
    kernel = ".sparse_linear.u8.s8_" if case.sparse else ".quantized_linear.u8.w"
    with expect(kernel):
        y = call(case, rows)
    if case.bias is None and case.residual is None:
        assert y.dtype == torch.float32
        y = y.to(case.x.dtype)
    case.check_forward(y)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 130, 65), (2, 70, 16), (8, 49, 64), (9, 8, 31), (27, 66, 130), (70, 5, 1100)],
)
def test_ragged_shapes(level: str, form: str, m: int, n: int, k: int) -> None:
    for dtype in ("f32", "bf16"):
        with isa(level):
            run(form, m, n, k, dtype, "gelu")


@given(
    m=st.integers(0, 80),
    n=st.integers(0, 150),
    k=st.integers(0, 300),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(["f32", "bf16", "f16"]),
    name=st.sampled_from(PLAIN),
    bias=st.booleans(),
    residual=st.booleans(),
    level=st.sampled_from(ISAS or ["portable"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_shape(
    m: int,
    n: int,
    k: int,
    form: str,
    dtype: str,
    name: str,
    bias: bool,
    residual: bool,
    level: str,
) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    with isa(level):
        run(form, m, n, k, dtype, name, bias=bias, residual=residual)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_one_quantisation_serves_several_products(form: str) -> None:
    torch.manual_seed(0)
    cases = [make(form, 40, n, 96) for n in (32, 96, 100)]
    rows = act_quant(cases[0].x)
    for case in cases:
        case.x = cases[0].x
        case.check_forward(call(case, rows))


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_leading_dimensions_strides_and_nan(form: str) -> None:
    for lead in ([], [0], [4, 0], [2, 3], [2, 1, 3, 2, 2]):
        case = make(form, lead, 6, 7, "f32", "silu")
        case.check_forward(call(case, rows_of(case)))
    case = make(form, [5, 4], 6, 40)
    values, scale, zero_point = rows_of(case)
    spread = QuantizedRows(
        values.repeat_interleave(2, -1)[..., ::2],
        scale.t().contiguous().t(),
        zero_point.t().contiguous().t(),
    )
    case.check_forward(call(case, spread))
    case.x[1, 2, 3] = float("nan")
    y = call(case, rows_of(case))
    assert y[1, 2].isnan().all()
    assert y.isnan().sum() == 6


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_bitwise_equal_from_run_to_run_at_every_thread_count(form: str) -> None:
    case = make(form, 130, 200, 700, "f32", "gelu")
    rows = rows_of(case)
    for count in (1, 2, 5):
        with threads(count):
            first, again = call(case, rows), call(case, rows)
        assert torch.equal(first, again)
        case.check_forward(first)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_means_the_same(form: str) -> None:
    case = make(form, 9, 20, 33, "f32", "gelu")
    op = rows_op(case)
    case.check_forward(op.reference(op.call(*raw_arguments(case, rows_of(case)))))


# paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_opcheck_compiled_exported_traced(form: str) -> None:
    case = make(form, [2, 5], 12, 8, "f32", "gelu")
    rows = rows_of(case)
    paths.opcheck(getattr(torch.ops.bigops, f"{case.op}_rows"), raw_arguments(case, rows))

    class Layer(torch.nn.Module):
        def forward(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
            return call(case, QuantizedRows(values, scale, zero_point))

    want = call(case, rows)
    torch._dynamo.reset()
    with expect(f".{case.op}.u8"):
        got = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*rows)
    assert torch.equal(got, want)
    program = torch.export.export(Layer(), tuple(rows), strict=False)
    assert torch.equal(program.module()(*rows), want)
    assert torch.equal(torch.fx.symbolic_trace(Layer())(*rows), want)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_vmap(form: str) -> None:
    case = make(form, [4, 3], 12, 9, "f32", "gelu", residual=False)
    got = torch.vmap(lambda *rows: call(case, QuantizedRows(*rows)))(*rows_of(case))
    case.check_forward(got)


def test_autocast_casts_what_is_floating() -> None:
    case = make("int8", 5, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(case, rows_of(case)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_explain_names_the_kernel_that_runs(form: str) -> None:
    for m in (2, 9):
        case = make(form, m, 5, 7)
        rows = rows_of(case)
        with expect(bigops.explain(case.op, rows, case.weight).kernel):
            call(case, rows)
    said = bigops.explain(case.op, rows, case.weight, device="sm_90").kernel
    assert said == f"reference.{case.op}_rows"


# refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("name", ["x_scale", "bias", "residual"])
def test_what_wants_a_gradient_is_refused(form: str, name: str) -> None:
    case = make(form, 3, 5, 4)
    values, scale, zero_point = rows_of(case)
    if name == "x_scale":
        scale.requires_grad_()
    else:
        getattr(case, name).requires_grad_()
    rows = QuantizedRows(values, scale, zero_point)
    message = f"{name}: expected a tensor that needs no gradient"
    with pytest.raises(ValueError, match=message):
        call(case, rows)
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.bigops, f"{case.op}_rows")(*raw_arguments(case, rows))
    with torch.no_grad():
        call(case, rows)


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"values": torch.zeros(3, 4)}, TypeError, "x: expected dtype"),
        (
            {"values": torch.zeros(3, 5, dtype=torch.uint8)},
            ValueError,
            r"x: expected shape \[.., 4",
        ),
        ({"scale": torch.ones(4)}, ValueError, r"x_scale: expected shape \[3\]"),
        ({"scale": torch.ones(3).double()}, TypeError, "x_scale: expected dtype"),
        ({"zero_point": torch.zeros(3)}, TypeError, "x_zero_point: expected dtype"),
        ({"scale": None}, TypeError, "x_scale: expected a torch.Tensor"),
        ({"scale": torch.ones(3, device="meta")}, Exception, "x_scale: expected"),
    ],
    ids=str,
)
def test_refused_by_name(form: str, change: dict[str, Any], kind: Any, message: str) -> None:
    case = make(form, 3, 5, 4)
    with pytest.raises(kind, match=message):
        call(case, rows_of(case)._replace(**change))


def test_weights_that_do_not_quantise_rows_refuse_them() -> None:
    for form in ("w8", "w4", "int8_static", "sparse_float"):
        case = make(form, 3, 5, 8)
        with pytest.raises(TypeError, match="x: expected a floating dtype, since this weight"):
            call(case, act_quant(case.x))
    case = make("int8", 3, 5, 8)
    with pytest.raises(ValueError, match="y_qparams: expected None with QuantizedRows"):
        call(case, act_quant(case.x), y_qparams=static_qparams(-1.0, 1.0))
    bitmap = bigops.formats.BitmapWeight.from_sparse(make("sparse_float", 3, 5, 8).weight)
    with pytest.raises(TypeError, match="x: expected a torch.Tensor with a BitmapWeight"):
        sparse_linear(act_quant(case.x), bitmap)
