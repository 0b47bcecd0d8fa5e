"""quantized_linear on the CPU: values on every instruction set, layouts, determinism, errors.

Gradients on every road are in test_frozen_linear_roads.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigops.ops._quantize import quantize_rows
from bigops.ops.quantized_linear import (
    QuantizedWeight,
    quantize_weight,
    quantized_linear,
    reference,
)
from tests.compressed_cases import DTYPES, LEVELS, Case
from tests.compressed_cases import make as make_case
from tests.kernels_ran import ISAS, expect, isa, needs_extension
from tests.linear_cases import PLAIN
from tests.tolerance import snr_db

module = importlib.import_module("bigops.ops.quantized_linear")  # the name is the function's, too
raw = torch.ops.bigops.quantized_linear
pytestmark = needs_extension

SNR_FLOOR_DB = 38.0  # normal weights and activations, K >= 256; 40 to 43 dB were measured


def make(
    lead: int | list[int],
    n: int,
    k: int,
    dtype: str = "f32",
    name: str = "none",
    bias: bool = True,
    residual: bool = True,
) -> Case:
    return make_case("int8", lead, n, k, dtype, name, bias=bias, residual=residual)


def run(case: Case, level: str, dtype: str, form: str) -> None:
    """Forward and backward of one case at one level, values and kernel names."""
    kernel = f"cpu.{level}.quantized_linear"
    x, bias, residual = leaves = case.leaves()
    with isa(level), expect(f"{kernel}.{dtype}.{form}", f"{kernel}_backward.{dtype}.direct"):
        y = quantized_linear(x, case.weight, bias, residual, case.name)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    case.check_gradients([None if t is None else next(grads) for t in leaves], level)


def form_of(m: int) -> str:
    return "dot" if m <= 8 else "columns"


# the activation quantiser ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantiser_by_its_definition(dtype: str) -> None:
    """In float64: u8 range, zero exact, no value further than half a step (plus rounding)."""
    x = (torch.randn(50, 300) * torch.logspace(-6, 4, 50).unsqueeze(1)).to(DTYPES[dtype])
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = 0
    q, scale, zero = (t.double() for t in quantize_rows(x))
    assert q.min() >= 0
    assert q.max() <= 255
    assert torch.equal(q, q.round())
    assert zero[1] == 0
    assert zero[2] == 255
    error = ((q - zero) * scale - x.double()).abs()
    # the zero point is rounded too, so that the ends of the range may lie half a step outside
    assert bool((error <= scale * (1 + 1e-4)).all())
    inside = (q > 0) & (q < 255)
    assert bool((error <= scale * 0.5 * (1 + 1e-4))[inside].all())


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 33])
def test_kernels_equal_the_reference_to_the_bit(level: str, dtype: str, m: int) -> None:
    """Exact sums and the same float steps: not one element differs without an activation."""
    for k in (1, 15, 16, 67, 515):
        case = make(m, 50, k, dtype)
        case.x[0] *= 1e-3
        case.x[1] = 0
        with isa(level), expect(f".quantized_linear.{dtype}.{form_of(m)}"):
            y = raw(case.x, *case.weight, case.bias, case.residual, "none")
        assert torch.equal(y, reference(case.x, *case.weight, case.bias, case.residual))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", [64, 1021, 65536, 65540, 140000])
def test_integer_extremes(level: str, k: int) -> None:
    """All weights and activations at the ends: 16-bit sums would saturate, int32 ones wrap."""
    for sign in (1, -1):
        weight = QuantizedWeight(torch.full((5, k), 127 * sign, dtype=torch.int8), torch.ones(5))
        for m in (2, 12):
            x = torch.full((m, k), 255.0)
            x[1, 0] = 0
            with isa(level), expect(".quantized_linear.f32."):
                y = quantized_linear(x, weight)
            want = x.double().sum(1, keepdim=True) * 127 * sign
            assert torch.equal(y, want.float().expand(m, 5))


# values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PLAIN)
def test_activations_on_every_instruction_set(level: str, name: str) -> None:
    for dtype in DTYPES:
        run(make(5, 37, 83, dtype, name), level, dtype, "dot")
        run(make(21, 37, 83, dtype, name), level, dtype, "columns")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 130, 65), (2, 3, 16), (8, 49, 64), (9, 8, 31), (65, 66, 130), (70, 5, 1100)],
)
def test_ragged_shapes(level: str, m: int, n: int, k: int) -> None:
    run(make(m, n, k, "f32", "gelu"), level, "f32", form_of(m))
    run(make(m, n, k, "bf16", "none"), level, "bf16", form_of(m))


@given(
    m=st.integers(0, 90),
    n=st.integers(0, 120),
    k=st.integers(0, 200),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(PLAIN),
    bias=st.booleans(),
    residual=st.booleans(),
    level=st.sampled_from(LEVELS or ["portable"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_shape(
    m: int, n: int, k: int, dtype: str, name: str, bias: bool, residual: bool, level: str
) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    run(make(m, n, k, dtype, name, bias, residual), level, dtype, form_of(m))


@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 3, 2, 2]], ids=str)
def test_leading_dimensions(lead: list[int]) -> None:
    m = torch.Size(lead).numel()
    run(make(lead, 6, 7, "f32", "silu"), LEVELS[-1], "f32", form_of(m))


@pytest.mark.parametrize("m", [4, 40])
def test_any_strides(m: int) -> None:
    case = make(m, 10, 24, "f32", "gelu")
    values, scale = case.weight
    x, bias, residual = case.inputs
    assert bias is not None
    assert residual is not None
    want = quantized_linear(x, case.weight, bias, residual, "gelu")
    spread = torch.empty(10, 3)
    spread[:, 1] = bias
    layouts = {
        "x": (x.t().contiguous().t(), case.weight, bias, residual),
        "values": (x, QuantizedWeight(values.t().contiguous().t(), scale), bias, residual),
        "scale": (x, QuantizedWeight(values, scale.repeat(2, 1).t()[:, 0]), bias, residual),
        "bias": (x, case.weight, spread[:, 1], residual),
        "residual": (x, case.weight, bias, residual.repeat_interleave(2, 1)[:, ::2]),
    }
    for what, args in layouts.items():
        assert torch.equal(quantized_linear(*args, activation="gelu"), want), what
    x = x.clone().requires_grad_()
    y = quantized_linear(x, case.weight, bias, residual, "gelu")
    grad = case.grad[:1].expand(m, 10)
    (got,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(y, x, grad.contiguous())[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [6, 20])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(level: str, dtype: str, m: int) -> None:
    for name in PLAIN:
        case = make(m, 19, 37, dtype, name)
        case.x[1, 36], case.x[3, 0], case.x[4, 20] = float("nan"), float("inf"), float("-inf")
        with isa(level), expect(f".quantized_linear.{dtype}.{form_of(m)}"):
            y = quantized_linear(case.x, case.weight, case.bias, case.residual, name)
        bad = torch.zeros(m, dtype=torch.bool)
        bad[[1, 3, 4]] = True
        assert bool(y[bad].isnan().all()), name
        assert bool(y[~bad].isfinite().all()), name


def test_bitwise_equal_from_run_to_run_and_over_threads() -> None:
    case = make(130, 200, 700, "f32", "gelu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            x, bias, residual = leaves = case.leaves()
            y = quantized_linear(x, case.weight, bias, residual, "gelu")  # type: ignore[arg-type]
            results.append((y, *torch.autograd.grad(y, leaves, case.grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_signal_to_noise_against_the_original_weight() -> None:
    for k in (256, 784, 2048):
        w, x = torch.randn(128, k), torch.randn(64, k)
        y = quantized_linear(x, quantize_weight(w))
        assert snr_db(y, x.double() @ w.double().t()) > SNR_FLOOR_DB


# conversions and errors --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
def test_quantize_weight_rounds_to_the_nearest_step(dtype: torch.dtype) -> None:
    w = torch.randn(20, 33).to(dtype)
    w[3] = 0
    q = quantize_weight(w)
    assert q.values.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 16
    error = (q.to_dense(torch.float64) - w.double()).abs()
    assert bool((error <= q.scale.double().unsqueeze(1) * 0.5 * (1 + 1e-5)).all())
    again = quantize_weight(q.to_dense())
    assert torch.equal(again.values, q.values)
    assert q.nbytes == 20 * 33 + 20 * 4
    q.validate()


@pytest.mark.parametrize(
    ("w", "kind", "message"),
    [
        (torch.randn(3), ValueError, "w: expected 2 dimensions"),
        (
            torch.ones(2, 2, dtype=torch.int32),
            TypeError,
            "w: expected dtype float32, .*; got int32",
        ),
        (torch.tensor([[1.0, float("nan")]]), ValueError, "w: expected finite values"),
        ([[1.0]], TypeError, "w: expected a torch.Tensor; got list"),
    ],
)
def test_quantize_weight_refuses(w: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        quantize_weight(w)


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        ((torch.zeros(3, 4), torch.ones(3)), TypeError, "values: expected dtype int8"),
        ((torch.zeros(3, 4).char(), torch.ones(4)), ValueError, r"scale: expected shape \[3\]"),
        ((torch.zeros(3, 4).char(), torch.zeros(3)), ValueError, "scale: expected finite"),
    ],
)
def test_validate(weight: tuple[Tensor, Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        QuantizedWeight(*weight).validate()


def refusals() -> list[tuple[str, type[Exception], str, dict[str, object]]]:
    good = quantize_weight(torch.randn(5, 4))
    return [
        ("activation", ValueError, "activation: expected one of none, .*; got 'swiglu'",
         {"activation": "swiglu"}),
        ("x dtype", TypeError, "x: expected dtype float32, bfloat16, float16; got float64",
         {"x": torch.randn(3, 4).double()}),
        ("x is no tensor", TypeError, "x: expected a torch.Tensor; got list", {"x": [1.0]}),
        ("x columns", ValueError, r"x: expected shape \[.., 4\] .*; got \[3, 7\]",
         {"x": torch.randn(3, 7)}),
        ("x scalar", ValueError, r"x: expected shape .*; got \[\]", {"x": torch.tensor(1.0)}),
        ("values dtype", TypeError, "weight: expected dtype int8; got float32",
         {"weight": QuantizedWeight(good.values.float(), good.scale)}),
        ("scale shape", ValueError, r"scale: expected shape \[5\]; got \[4\]",
         {"weight": QuantizedWeight(good.values, good.scale[:4])}),
        ("weight device", ValueError, "weight: expected device cpu, that of x; got meta",
         {"weight": QuantizedWeight(good.values.to("meta"), good.scale)}),
        ("bias shape", ValueError, r"bias: expected shape \[5\]; got \[4\]",
         {"bias": torch.randn(4)}),
        ("bias dtype", TypeError, "bias: expected dtype float32, that of x; got float64",
         {"bias": torch.randn(5).double()}),
        ("residual shape", ValueError, r"residual: expected shape \[3, 5\]; got \[1, 5\]",
         {"residual": torch.randn(1, 5)}),
    ]  # fmt: skip


@pytest.mark.parametrize("graph", [False, True], ids=["inference", "graph"])
@pytest.mark.parametrize(
    ("kind", "message", "change"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()]
)
def test_errors_name_argument_expected_and_got(
    kind: type[Exception], message: str, change: dict[str, object], graph: bool
) -> None:
    arguments: dict[str, object] = {
        "x": torch.randn(3, 4),
        "weight": quantize_weight(torch.randn(5, 4)),
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
        ({1: torch.zeros(5, 4)}, "weight: expected dtype s8"),
        ({2: torch.ones(3)}, "scale: expected shape"),
        ({3: torch.ones(3)}, "bias: expected shape"),
        ({4: torch.ones(1, 5)}, "residual: expected x's shape"),
        ({5: "swiglu"}, "activation: expected one that is no gated pair"),
    ],
)
def test_raw_op_checks_again(change: dict[int, object], message: str) -> None:
    args: list[object] = [
        torch.randn(3, 4),
        *quantize_weight(torch.randn(5, 4)),
        None,
        None,
        "none",
    ]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        raw(*args)


# planted faults ----------------------------------------------------------------------------


def test_a_stand_in_is_seen() -> None:
    case = make(3, 5, 4)

    def stand_in() -> None:
        with expect(".quantized_linear.f32.dot"):
            module._op._serve(case.x, *case.weight, None, None, "none")

    with pytest.raises(AssertionError, match="no '.quantized_linear.f32.dot' among"):
        stand_in()


def test_a_wrong_kernel_is_seen() -> None:
    """One element off by 0.1 %, and a zero point that is off by one, both fail the rule."""
    case = make(5, 37, 83, "f32", "gelu")
    y = quantized_linear(case.x, case.weight, case.bias, case.residual, "gelu")
    off = y.clone()
    off.view(-1)[int(y.abs().argmax())] *= 1.001
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(off)
    rows = quantize_rows(case.x)
    shifted = ((rows.q - rows.zero_point - 1) * rows.scale).double() @ case.dense.t()
    assert case.bias is not None
    assert case.residual is not None
    wrong = torch.nn.functional.gelu(shifted + case.bias) + case.residual
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(wrong.float())
