"""quantized_linear: values of every format by every way that serves it, layouts.

Gradients on every path are in tests/ops/family/test_paths.py, the storage is held to its definition
in tests/formats/test_quantized.py. What is the GPU kernels' own, such as tiles, schedules and
planted faults, is in test_triton.py and test_cuda.py, what is refused in test_errors.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigops.formats.quantize import act_quant, static_qparams
from bigops.formats.quantized import QuantizedWeight, pack
from bigops.ops.quantized_linear import op, quantized_linear
from tests.support.backends import CPU, HOSTRUN, REFERENCE, TRITON, Way, covering
from tests.support.cases.compressed import (
    DTYPES,
    QUANTISED,
    Case,
    backward_of,
    check_runs_and_threads,
    kernel_of,
)
from tests.support.cases.compressed import make as make_case
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension
from tests.support.tolerance import check, snr_db

raw = torch.ops.bigops.quantized_linear
pytestmark = needs_extension

EXACT = [form for form in QUANTISED if form.startswith("int8")]  # int32 sums over all of K
FLOATING = ("w8", "w8_group", "w8_zero", "w4", "w4_zero", "w4_row")  # x is not rounded
WAYS = [REFERENCE, *CPU, TRITON, HOSTRUN]
# One of each kernel, for what is the same in all formats of a kernel.
KERNELS = ("int8_zero", "w8_zero", "w4", "w4a8")


def make(
    form: str,
    lead: int | list[int],
    n: int,
    k: int,
    dtype: str = "f32",
    name: str = "none",
    bias: bool = True,
    residual: bool = True,
) -> Case:
    return make_case(form, lead, n, k, dtype, name, bias=bias, residual=residual)


def kernels_of(form: str, way: Way, dtype: str, m: int) -> tuple[str, ...]:
    """Names of the kernels by which a way serves a format, backward where it has one."""
    if way.name == "cpu":
        return kernel_of(form, way.level, dtype, m), backward_of(form, way.level, dtype)
    bits = QUANTISED[form].get("bits", 8)
    device, a8 = ("cuda", "") if way is HOSTRUN else ("triton", "" if form in FLOATING else "a8")
    forward = f"{device}.quantized_linear.{dtype}.w{bits}{a8}"
    return forward, f"triton.quantized_linear_backward.{dtype}.w{bits}"


def run(case: Case, form: str, way: Way, dtype: str) -> None:
    """Forward and backward of one case by one way, values and kernel names."""
    x, bias, residual = leaves = case.leaves()
    names = kernels_of(form, way, dtype, case.call.rows)
    with way.serving("quantized_linear", *names, gradients=True):
        y = quantized_linear(x, case.weight, bias, residual, case.name)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    found = [None if t is None else next(grads) for t in leaves]
    case.check_gradients(found, str(way), stored=way in (TRITON, HOSTRUN))


# the activation quantisers -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantiser_by_its_definition(dtype: str) -> None:
    """In float64: u8 range, zero exact, no value further than half a step (plus rounding)."""
    x = (torch.randn(50, 300) * torch.logspace(-6, 4, 50).unsqueeze(1)).to(DTYPES[dtype])
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = 0
    q, scale, zero = (t.double() for t in act_quant(x))
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


def test_symmetric_and_static_quantisers_by_their_definition() -> None:
    x = torch.randn(50, 300) * torch.logspace(-6, 4, 50).unsqueeze(1)
    x[3] = 0
    q, scale, zero = (t.double() for t in act_quant(x, "symmetric"))
    assert bool((zero == 128).all())
    assert q.min() >= 1
    assert bool((((q - zero) * scale - x.double()).abs() <= scale * 0.5 * (1 + 1e-4)).all())
    qparams = static_qparams(-1.0, 3.0)
    q, scale, zero = (t.double() for t in act_quant(x, "static", qparams))
    assert bool((scale == qparams[0].double()).all())
    near = x.double().clamp(-1.0, 3.0)
    assert bool((((q - zero) * scale - near).abs() <= scale * (1 + 1e-4)).all())


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", EXACT)
def test_rows_of_every_size_beside_zeros(level: str, dtype: str, form: str) -> None:
    """A row of small numbers and one of zeros among others, at widths around those of vectors."""
    for m in (1, 2, 3, 33):
        for k in (1, 15, 16, 67, 515):
            case = make(form, m, 50, k, dtype)
            case.x[0] *= 1e-3
            case.x[-1] = 0
            with isa(level), expect(kernel_of(form, level, dtype, m)):
                y = raw(case.x, *case.storage, case.bias, case.residual, "none")
            case.check_forward(y)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", ["int8", "int8_zero"])
def test_weights_from_memory_go_by_parts_of_k(level: str, form: str) -> None:
    """More than 4 MB: sums are carried from part to part, whatever the block of rows."""
    whole = make(form, 55, 1030, 4100)
    assert whole.weight.values.nbytes > 4 << 20
    truth, plain = (whole.truth(dtype)[0] for dtype in (torch.float64, torch.float32))
    scale = whole.scales()[0]
    for m in (6, 7, 16, 19, 24, 55):
        case = whole.rows(m)
        with isa(level), expect(kernel_of(form, level, "f32", m)):
            y = raw(case.x, *case.storage, case.bias, case.residual, "none")
        check(y, truth[:m], plain[:m], scale[:m])


def whole(q: Tensor, zero: float | None = None) -> QuantizedWeight:
    """An int8 weight of these numbers [N, K] with scales of 1."""
    n, k = q.shape
    weight = QuantizedWeight.from_dense(torch.zeros(n, k), symmetric=zero is None)
    points = None if zero is None else torch.full_like(weight.scale, zero).to(torch.int8)
    sums = torch.nn.functional.pad(q.sum(1), (0, -n % 16)).to(torch.int32)
    weight = weight.replace(values=pack(q, 8), zero_point=points, row_sum=sums)
    weight.validate()
    return weight


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("k", [64, 1021, 65536, 65540, 140000])
def test_integer_extremes(level: str, k: int) -> None:
    """All weights and activations at the ends: 16-bit sums would saturate, int32 ones wrap."""
    for value, zero in ((127, None), (-128, None), (127, -128), (-128, 127)):
        weight = whole(torch.full((5, k), float(value)), zero)
        for m in (1, 2, 12):
            x = torch.full((m, k), 255.0)
            x[-1, 0] = 0
            with isa(level), expect(".quantized_linear.f32.w8a8"):
                y = quantized_linear(x, weight)
            want = x.double().sum(1, keepdim=True) * (value - (zero or 0))
            assert torch.equal(y, want.float().expand(m, 5))


@pytest.mark.parametrize("level", ISAS)
def test_int4_extremes(level: str) -> None:
    """Every nibble at an end, zero points at the other: sums of a group stay exact."""
    for value, zero in ((7, -8), (-8, 7), (-8, -8)):
        base = QuantizedWeight.from_dense(torch.zeros(20, 300), 4, 128, False, "none")
        weight = base.replace(
            values=pack(torch.full((20, 300), float(value)), 4),
            zero_point=torch.full_like(base.zero_point, zero),
        )
        for dtype in DTYPES.values():
            x = torch.randint(-3, 4, (7, 300)).to(dtype)
            with isa(level), expect(".w4"):
                y = quantized_linear(x, weight)
            want = (x.double().sum(1, keepdim=True) * (value - zero)).to(dtype)
            assert torch.equal(y, want.expand(7, 20))


# values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(way: Way, name: str) -> None:
    some = {
        TRITON: [(form, "f32") for form in KERNELS],
        HOSTRUN: [("w4_zero", "f32"), ("w8", "bf16")],
    }
    for form, dtype in some.get(way, itertools.product(KERNELS, DTYPES)):
        run(make(form, 5, 37, 83, dtype, name), form, way, dtype)


@pytest.mark.parametrize(
    ("way", "form", "dtype", "m"),
    [(REFERENCE, form, dtype, 37) for form in QUANTISED for dtype in DTYPES]
    + covering([TRITON], QUANTISED, DTYPES, [37])
    + covering([HOSTRUN], FLOATING, DTYPES, (3, 11)),
    ids=str,
)
def test_every_format_and_dtype(way: Way, form: str, dtype: str, m: int) -> None:
    run(make(form, m, 45, 150, dtype, "gelu"), form, way, dtype)


@pytest.mark.parametrize("way", [REFERENCE, *CPU], ids=str)
@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 130, 65), (2, 70, 16), (8, 49, 64), (9, 8, 31), (27, 66, 130), (70, 5, 1100)],
)
def test_ragged_shapes(way: Way, form: str, m: int, n: int, k: int) -> None:
    for dtype in DTYPES:
        run(make(form, m, n, k, dtype, "gelu" if dtype == "f32" else "none"), form, way, dtype)


# Ragged against the tiles of configs/quantized_linear/interpreter.json, and for CUDA C++ against
# blocks of 64 rows and stages of 128 or 256 columns.
@pytest.mark.parametrize(
    ("way", "form", "shape"),
    covering(
        [TRITON],
        (*KERNELS, "w4_row", "w4a8_zero"),
        [
            (1, 1, 1),
            (2, 33, 65),
            (31, 1, 32),
            (64, 64, 64),
            (3, 70, 129),
            (5, 7, 0),
            (0, 7, 5),
            (5, 0, 7),
        ],
    )
    + covering(
        [HOSTRUN],
        ("w8_zero", "w4_zero", "w4_row"),
        [
            (1, 1, 1),
            (16, 64, 256),
            (9, 65, 257),
            (2, 130, 1030),
            (8, 16, 1032),
            (3, 16, 0),
            (5, 0, 32),
        ],
    ),
    ids=str,
)
def test_shapes_of_gpu_kernels(way: Way, form: str, shape: tuple[int, int, int]) -> None:
    run(make(form, *shape, "bf16", "silu"), form, way, "bf16")


@pytest.mark.parametrize(
    ("way", "form", "given"),
    covering([TRITON], KERNELS, [(False, False), (True, False), (False, True)])
    + [(HOSTRUN, "w8_zero", given) for given in [(False, False), (True, False), (False, True)]],
    ids=str,
)
def test_optional_arguments(way: Way, form: str, given: tuple[bool, bool]) -> None:
    m = 16 if way is HOSTRUN else 33
    run(make(form, m, 20, 35, "f16", "gelu", *given), form, way, "f16")


@pytest.mark.parametrize("form", KERNELS)
def test_many_rows_split_into_tasks(form: str) -> None:
    """Few tiles and many rows: tasks take parts of the rows."""
    run(make(form, 200, 40, 300, "bf16"), form, CPU[-1], "bf16")


@given(
    m=st.integers(0, 90),
    n=st.integers(0, 120),
    k=st.integers(0, 200),
    form=st.sampled_from(sorted(QUANTISED)),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(PLAIN),
    bias=st.booleans(),
    residual=st.booleans(),
    level=st.sampled_from(ISAS or ["portable"]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
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
    run(make(form, m, n, k, dtype, name, bias, residual), form, Way("cpu", level), dtype)


@pytest.mark.parametrize(
    ("way", "form"),
    [(way, form) for way in (REFERENCE, *CPU[-1:], TRITON) for form in KERNELS] + [(HOSTRUN, "w4")],
    ids=str,
)
@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 3, 2]], ids=str)
def test_leading_dimensions(way: Way, form: str, lead: list[int]) -> None:
    if way is HOSTRUN and 0 in lead:
        way = TRITON  # which serves what has no rows
    run(make(form, lead, 6, 7, "f32", "silu"), form, way, "f32")


@pytest.mark.parametrize("form", ["int8_zero", "w4_zero", "w4a8_static"])
@pytest.mark.parametrize("m", [4, 40])
def test_any_strides(form: str, m: int) -> None:
    case = make(form, m, 10, 24, "f32", "gelu")
    x, bias, residual = case.inputs
    assert bias is not None
    assert residual is not None
    want = quantized_linear(x, case.weight, bias, residual, "gelu")
    spread = torch.empty(10, 3)
    spread[:, 1] = bias

    def odd(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    layouts: dict[str, tuple[Any, ...]] = {
        "x": (x.t().contiguous().t(), case.weight, bias, residual),
        "bias": (x, case.weight, spread[:, 1], residual),
        "residual": (x, case.weight, bias, odd(residual)),
    }
    for name in ("values", "scale", "zero_point", "row_sum", "x_qparams"):
        part = getattr(case.weight, name)
        if part is not None:
            changed = case.weight.replace(**{name: odd(part)})
            layouts[name] = (x, changed, bias, residual)
    for what, args in layouts.items():
        assert torch.equal(quantized_linear(*args, activation="gelu"), want), what
    x = x.clone().requires_grad_()
    y = quantized_linear(x, case.weight, bias, residual, "gelu")
    grad = case.grad[:1].expand(m, 10)
    (got,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(y, x, grad.contiguous())[0])


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "int8_symmetric", "int8_static", "w4a8", "w4", "w8"])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(level: str, dtype: str, form: str) -> None:
    floating = form in ("w4", "w8")
    for name in PLAIN:
        case = make(form, 20, 19, 37, dtype, name)
        case.x[1, 36] = float("nan")
        if not floating:  # in floating point an infinity may well stay one
            case.x[3, 0], case.x[4, 20] = float("inf"), float("-inf")
        with isa(level), expect(kernel_of(form, level, dtype, 20)):
            y = quantized_linear(case.x, case.weight, case.bias, case.residual, name)
        bad = torch.zeros(20, dtype=torch.bool)
        bad[[1] if floating else [1, 3, 4]] = True
        assert bool(y[bad].isnan().all()), name
        assert bool(y[~bad].isfinite().all()), name


@pytest.mark.parametrize("form", KERNELS)
def test_bitwise_equal_from_run_to_run_at_every_thread_count(form: str) -> None:
    check_runs_and_threads(make(form, 130, 200, 700, "f32", "gelu"))


# Against the product with the original weight, normal weights and activations, K >= 256. What was
# measured: int8 40 to 43 dB; int4 with one scale a row 16.3, groups of 64 19.7, of 32 with zero
# points 21.8, groups of 64 and u8 activations 19.7.
SNR_FLOOR_DB = {
    "int8": 38.0,
    "w8_group": 43.0,
    "w4_row": 15.5,
    "w4": 18.5,
    "w4_zero": 20.5,
    "w4a8": 18.5,
}


@pytest.mark.parametrize("form", SNR_FLOOR_DB)
def test_signal_to_noise_against_the_original_weight(form: str) -> None:
    for k in (256, 784, 2048):
        w, x = torch.randn(128, k), torch.randn(64, k)
        y = quantized_linear(x, QuantizedWeight.from_dense(w, **QUANTISED[form]))
        assert snr_db(y, x.double() @ w.double().t()) > SNR_FLOOR_DB[form]


# planted faults ----------------------------------------------------------------------------


def test_a_stand_in_is_seen() -> None:
    case = make("int8", 3, 5, 4)

    def stand_in() -> None:
        with expect(".quantized_linear.f32.w8a8"):
            op.serve(case.call)

    with pytest.raises(AssertionError, match="no '.quantized_linear.f32.w8a8' among"):
        stand_in()


@pytest.mark.parametrize("form", ["int8", "w4", "w4a8"])
def test_a_wrong_kernel_is_seen(form: str) -> None:
    """One element off by 0.1 %, and a zero point that is off by one, both fail the rule."""
    case = make(form, 5, 37, 83, "f32", "gelu")
    y = quantized_linear(case.x, case.weight, case.bias, case.residual, "gelu")
    off = y.clone()
    off.view(-1)[int(y.abs().argmax())] *= 1.001
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(off)
    if case.quantised:
        rows = act_quant(case.x)
        shifted = ((rows.q - rows.zero_point - 1) * rows.scale).double() @ case.dense.t()
    else:
        moved = case.dense - case.weight.scale.t()[:37].double().repeat_interleave(64, 1)[:, :83]
        shifted = case.x.double() @ moved.t()
    assert case.bias is not None
    assert case.residual is not None
    wrong = torch.nn.functional.gelu(shifted + case.bias) + case.residual
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(wrong.float())
