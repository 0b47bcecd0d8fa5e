"""What is the Triton kernels' own in quantized_linear: rows, tiles, strides, planted faults.

Their values by the public function are in test_values.py, beside those of other ways.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


import bigops
from bigops.formats.quantize import act_quant, static_qparams
from bigops.formats.quantized import QuantizedWeight, pack
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.quantized_linear import forward as kernels
from bigops.kernels.quantized_linear import rows
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from bigops.ops import activation as act
from bigops.ops.family import Call
from bigops.ops.quantized_linear import triton as path
from tests.support import triton_interpreter
from tests.support.cases.compressed import DTYPES, QUANTISED, Case, make
from tests.support.guarded import guarded
from tests.support.kernel_checks import (
    check_refusals,
    check_rows_that_are_not_finite,
    in_far_rows,
    rows_of_all_kinds,
)
from tests.support.planted import CAUGHT, plant

triton_interpreter.install()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # numpy's, on NaN and inf, and on integers that wrap on the way to a sum that fits
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
EXACT = [form for form in QUANTISED if form.startswith("int8")]  # int32 sums over all of K
KINDS = ("int8_zero", "w8_zero", "w4", "w4a8")  # one of each kind of product


def kernel_of(form: str, dtype: str) -> str:
    bits = QUANTISED[form].get("bits", 8)
    rounds = form.startswith("int8") or "a8" in form
    return f"triton.quantized_linear.{dtype}.w{bits}{'a8' if rounds else ''}"


def call(
    case: Case, module: ModuleType = kernels, config: TileConfig | None = None, **given: Any
) -> Tensor:
    """The kernels on the flat inputs of a case, outputs between guards."""
    weight: QuantizedWeight = given.pop("weight", case.weight)
    x, bias, residual = case.inputs
    form = (weight.n, weight.bits, weight.group, weight.activations)
    with guarded():
        y: Tensor = module.forward(
            x, *weight.tensors().values(), *form, bias, residual, act.CODES[case.name], config
        )
    return y


# rows of x as whole numbers ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["dynamic", "symmetric", "static"])
@pytest.mark.parametrize("k", [1, 64, 150])
def test_rows_are_quantised_to_the_bit_as_the_reference_does(
    k: int, activations: str, dtype: str
) -> None:
    x = rows_of_all_kinds(k)
    x[10:] += torch.randn(30, 1)
    x = x.to(DTYPES[dtype])
    qparams = static_qparams(-1.0, 3.0) if activations == "static" else None
    with guarded():
        q, scale, zero, sums = rows.quantize_activations(x, activations, qparams)
    want = act_quant(x, activations, qparams)
    finite = x.isfinite().all(1)
    assert torch.equal(scale.isnan(), ~finite)
    assert torch.equal(scale[finite], want.scale[finite, 0])
    assert torch.equal(zero[finite] + 128, want.zero_point[finite, 0].int())
    assert torch.equal(q[finite, :k] + 128.0, want.q[finite])
    assert not q[:, k:].any(), "columns beyond K that are not 0"
    assert q.shape[1] % 128 == 0
    assert torch.equal(sums, q.sum(1, dtype=torch.int32))


def test_rows_of_any_strides_are_quantised_alike() -> None:
    x = torch.randn(20, 70)
    want = rows.quantize_activations(x, "dynamic")
    for layout in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        for got, expected in zip(rows.quantize_activations(layout, "dynamic"), want, strict=True):
            assert torch.equal(got, expected)


# values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", EXACT)
def test_rows_of_small_numbers_and_of_zeros(form: str, dtype: str) -> None:
    for m, k in ((1, 15), (33, 67), (3, 260)):
        case = make(form, m, 50, k, dtype)
        case.x[0] *= 1e-3
        case.x[-1] = 0
        case.check_forward(call(case))


@pytest.mark.parametrize("form", [*KINDS, "w4_row", "w8_group"])
@pytest.mark.parametrize("tile", [(128, 64, 128, 4), (16, 32, 64, 1)], ids=str)
def test_tiles_of_other_sizes_and_epilogue_in_parts(tile: tuple[int, ...], form: str) -> None:
    *block, parts = tile
    case = make(form, 50, 70, 200, "bf16", "relu")
    config = TileConfig(*block, 8, 4, 3, parts)
    case.check_forward(call(case, config=kernels.within(config, case.weight.group)))


@pytest.mark.parametrize("form", ["int8_zero", "w4_zero", "w4a8_static"])
def test_any_strides(form: str) -> None:
    case = make(form, 20, 10, 64, "f32", "gelu")

    def odd(t: Tensor | None) -> Any:
        return None if t is None else t.repeat_interleave(2, -1)[..., ::2]

    weight = case.weight.map(odd)
    spread = Case(case.x.t().contiguous().t(), weight, *_rest(case, odd(case.bias)))
    case.check_forward(call(spread))
    expanded = Case(case.x, weight, *_rest(case, case.bias))
    expanded.residual = case.residual[:1].expand(20, 10)  # type: ignore[index]
    expanded.check_forward(call(expanded))


def _rest(case: Case, bias: Tensor | None) -> tuple[Any, ...]:
    return case.dense, case.quantised, bias, case.residual, case.grad, case.name


@pytest.mark.parametrize("k", [64, 1021, 33026])
def test_integer_extremes(k: int) -> None:
    """All numbers at the ends; 255 * 255 * 33026 is past int32."""
    ends = ((127, -128), (-128, 127), (-128, None))
    for value, zero in ends if k < 2000 else ends[:1]:  # the long one takes seconds
        weight = QuantizedWeight.from_dense(torch.zeros(5, k), symmetric=zero is None)
        points = None if zero is None else torch.full_like(weight.scale, zero).to(torch.int8)
        q = torch.full((5, k), float(value))
        sums = torch.nn.functional.pad(q.sum(1), (0, 11)).to(torch.int32)
        weight = weight.replace(values=pack(q, 8), zero_point=points, row_sum=sums)
        x = torch.full((3, k), 255.0)
        x[-1, 0] = 0
        y = kernels.forward(
            x,
            *weight.tensors().values(),
            5,
            8,
            0,
            "dynamic",
            config=TileConfig(16, 16, 128, 8, 4, 2, 1),
        )
        want = x.double().sum(1, keepdim=True) * (value - (zero or 0))
        assert torch.equal(y, want.float().expand(3, 5))


def test_int4_extremes() -> None:
    """Every nibble at an end, zero points at the other: sums of a group stay exact."""
    for value, zero in ((7, -8), (-8, 7), (-8, -8)):
        base = QuantizedWeight.from_dense(torch.zeros(20, 300), 4, 128, False, "none")
        weight = base.replace(
            values=pack(torch.full((20, 300), float(value)), 4),
            zero_point=torch.full_like(base.zero_point, zero),
        )
        for dtype in DTYPES.values():
            x = torch.randint(-3, 4, (7, 300)).to(dtype)
            y = kernels.forward(x, *weight.tensors().values(), 20, 4, 128, "none")
            want = (x.double().sum(1, keepdim=True) * (value - zero)).to(dtype)
            assert torch.equal(y, want.expand(7, 20))


def test_every_column_of_a_line_is_itself() -> None:
    """One weight at a time: a permutation of columns that is its own inverse would hide."""
    for bits, columns in ((8, 4), (4, 8)):
        for column in range(columns):
            q = torch.zeros(17, 40)
            q[3, 8 + column] = 5
            base = QuantizedWeight.from_dense(torch.zeros(17, 40), bits, 32, True, "none")
            weight = base.replace(values=pack(q, bits))
            y = kernels.forward(torch.eye(40), *weight.tensors().values(), 17, bits, 32, "none")
            assert torch.equal(y, q.t())


@pytest.mark.parametrize("form", ["int8", "int8_symmetric", "int8_static", "w4a8", "w4", "w8"])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(form: str) -> None:
    case = make(form, 20, 19, 37, "bf16", "relu")
    check_rows_that_are_not_finite(case, call, form in ("w4", "w8"))


@pytest.mark.parametrize("form", ["w4", "int8"])
def test_offsets_past_32_bits(form: str, tmp_path: Path) -> None:
    case = make(form, 18, 20, 40, "f16", "gelu")
    case.x = in_far_rows(tmp_path, case.x)
    case.check_forward(call(case))


def test_bitwise_equal_from_run_to_run() -> None:
    for form in KINDS:
        case = make(form, 30, 40, 100, "f32", "gelu")
        assert torch.equal(call(case), call(case))


def test_bad_arguments() -> None:
    weight, form = QuantizedWeight.from_dense(torch.randn(5, 8)), (5, 8, 0, "dynamic")
    check_refusals(kernels, weight, *form)
    wide = torch.zeros(1, 1).expand(1, kernels.MAX_K)
    with pytest.raises(ValueError, match=r"x: expected fewer than 131072 columns to quantise"):
        kernels.forward(wide, *weight.tensors().values(), *form)


# which kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", QUANTISED)
def test_explain_names_kernel_and_config(form: str) -> None:
    case = make(form, 64, 48, 256, "bf16")
    said = bigops.explain("quantized_linear", case.x, case.weight, device="sm_90")
    assert said.kernel == kernel_of(form, "bf16")
    kind = said.kernel.rpartition(".")[2]
    config = quantized_tiles.choose_config("sm_90", kind, torch.bfloat16, 64)
    config = kernels.within(config, case.weight.group)
    assert said.config == {**config.of_one_form(), "file": "quantized_linear/sm_90.json"}
    assert said.reason == (
        f"aligned {kind} bf16 tile for 64 rows from kernels/configs/quantized_linear/sm_90.json"
    )
    ragged = bigops.explain("quantized_linear", case.x[0, :], case.weight, device="gfx942")
    assert "for 1 rows" in ragged.reason


def test_explain_says_what_no_gpu_kernel_serves() -> None:
    case = make("int8_static", 4, 6, 40)
    u8 = torch.zeros(4, 40, dtype=torch.uint8)
    for x, qparams, why in ((u8, None, "uint8 x"), (case.x, case.weight.x_qparams, "uint8 result")):
        said = bigops.explain("quantized_linear", x, case.weight, device="sm_90", y_qparams=qparams)
        assert said.kernel == "reference.quantized_linear_u8"
        assert why in said.reason
    assert path.MAX_K == kernels.MAX_K
    wide = torch.empty(4, 1 << 17, device="meta")
    for activations, why in (("dynamic", "131072 columns"), ("none", "")):
        weight = QuantizedWeight.empty(6, 1 << 17, activations=activations)
        said = path.why_not(Call(wide, weight), weight, "sm_90")
        assert why in said
        assert bool(why) == bool(said)
    with pytest.raises(ValueError, match="x: expected shape"):
        bigops.explain("quantized_linear", case.x[:, 1:], case.weight, device="sm_90")


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS = {
    "nibbles swapped": ("w4", "tl.join(w & 15, w >> 4)", "tl.join(w >> 4, w & 15)"),
    "columns of a line permuted": ("w4", "(0, 2, 1, 4, 5, 3)", "(0, 2, 1, 3, 5, 4)"),
    "nibble not centred": ("w4", ".to(tl.int8) - 8", ".to(tl.int8) - 7"),
    "rows and lines swapped": ("w8", "w = tl.permute(w, (0, 2, 1, 3))", "w = w"),
    "zero point of W added": ("w8_zero", "- zero.to(tl.int16)", "+ zero.to(tl.int16)"),
    "scale of the first group for all": ("w4_zero", "tl.cast(k0 // GROUP", "tl.cast(0 // GROUP"),
    "scale of a row forgotten": ("w4_row", "total *= tl.load", "total += tl.load"),
    "K edge not masked": ("w8", "(rk[None, :] < K - k0)", "(rk[None, :] < K)"),
    "lines past the end": ("w4", "< LINES - k0 * BITS // 32", "< LINES"),
    "zero point of x off by one": ("int8", "tl.maximum(zero, 0.0)", "tl.maximum(zero + 1.0, 0.0)"),
    "correction by x forgotten": ("int8", "x_at[:, None] * sums[None, :]", "x_at[:, None] * 0"),
    "correction by W forgotten": ("int8_zero", "(of_x - x_at * K)", "(of_x - x_at)"),
    "columns not written": ("int8", "range(0, stride_q, BLOCK_N)", "range(0, BLOCK_N, BLOCK_N)"),
    "sums of a row by another": ("w4a8", "sums[None, :]) * by", "sums[None, :] * 1.01) * by"),
    "qparams of x ignored": ("int8_static", "one * tl.load(grid + 1)", "one * 0.0"),
    "last K step dropped": ("w4a8", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    form, old, new = FAULTS[fault]
    module = plant(kernels, tmp_path, old, new, rows)
    case = make(form, 37, 45, 134, "f32", "gelu")
    case.check_forward(call(case))
    with pytest.raises(CAUGHT):
        case.check_forward(call(case, module))


def test_a_copy_without_a_fault_passes(tmp_path: Path) -> None:
    case = make("w4_zero", 37, 45, 134, "f32", "gelu")
    case.check_forward(call(case, plant(kernels, tmp_path, "M,", "M,", rows)))
