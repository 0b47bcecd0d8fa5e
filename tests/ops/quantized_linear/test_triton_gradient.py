"""The Triton kernels of gx = gz W for int8, int4 and fp8 weights: formats, tiles, strides, range.

They are called by the backward of the op, as on a GPU, or by themselves on the gradient as it is.
Values of int8 and int4 by the public function are in test_values.py, beside those of
other ways. Planted faults come last.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from bigops.formats.fp8 import Fp8Weight
from bigops.formats.quantized import QuantizedWeight, pack
from bigops.kernels.common import scaled_dot
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.fp8_linear import gradient as fp8_kernels
from bigops.kernels.fp8_linear import tiles as fp8_tiles
from bigops.kernels.quantized_linear import gradient as quantized_kernels
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from bigops.ops.family import Call
from bigops.ops.fp8_linear import triton as fp8_path
from bigops.ops.quantized_linear import triton as quantized_path
from tests.support import triton_interpreter
from tests.support.cases.compressed import DTYPES, FP8, Case, make
from tests.support.guarded import guarded
from tests.support.kernel_checks import in_far_rows
from tests.support.kernels_ran import expect
from tests.support.planted import CAUGHT, plant

triton_interpreter.install()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on masked lanes
]
QUANTIZED = ("w8_zero", "w8_group", "w4_zero", "w4_row")  # storage, groups and zero points
SCALES = ("w_fp8", "w_fp8_block", "w_fp8_tensor")
ONE_OF_EACH = (*QUANTIZED, *SCALES)
OF_ANY_ORDER = ("w8_zero", "w4_zero", *SCALES)
ARCHS = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"]


def is_fp8(form: str) -> bool:
    return "fp8" in form


def kernels_of(form: str) -> ModuleType:
    return fp8_kernels if is_fp8(form) else quantized_kernels


def path_of(form: str) -> ModuleType:
    return fp8_path if is_fp8(form) else quantized_path


def ragged(form: str) -> tuple[int, int, int]:
    """Sizes past one tile; of fp8 past one block of 128 rows and columns of W."""
    return (35, 150, 140) if is_fp8(form) else (37, 75, 134)


def call(
    case: Case,
    module: ModuleType | None = None,
    config: TileConfig | None = None,
    gz: Tensor | None = None,
    **how: Any,
) -> Tensor:
    """The kernel on grad as it is, the output between guards."""
    weight = case.weight
    if hasattr(weight, "scales"):
        stored = (weight.values, weight.scale, weight.k, weight.scales)
        module = module or fp8_kernels
    else:
        codes = (weight.values, weight.scale, weight.zero_point)
        stored = (*codes, weight.k, weight.bits, weight.group)
        module = module or quantized_kernels
    with guarded():
        gx: Tensor = module.gradient(case.grad if gz is None else gz, *stored, config, **how)
    return gx


def hold(case: Case, gx: Tensor) -> None:
    """``gx`` against the rule, where the activation is "none": gz is grad then."""
    bias, residual = case.truth(torch.float64)[1][1:]
    rest = [None if t is None else t.to(gx.dtype) for t in (bias, residual)]
    case.check_gradients([gx, *rest], stored=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FP8)
def test_every_fp8_format_and_dtype(form: str, dtype: str) -> None:
    case = make(form, 33, 40, 70, dtype, "gelu")
    args = (case.grad, Call(case.x, case.weight, case.bias, None, "gelu"), True, True)
    with guarded(), expect(f"triton.fp8_linear_backward.{dtype}"):
        gx, gb = fp8_path.backward(*args)
    case.check_gradients([gx, gb, case.grad], stored=True)


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("tile", [(16, 64, 64), (64, 128, 32), (32, 32, 128)], ids=str)
def test_tiles_of_other_sizes(tile: tuple[int, ...], form: str) -> None:
    dtype = "f16" if form in ("w4_zero", "w_fp8_block") else "bf16"
    sizes = ragged(form) if is_fp8(form) else (35, 70, 85)
    case = make(form, *sizes, dtype, residual=False)
    hold(case, call(case, config=TileConfig(*tile, 8, 4, 3, 1)))


@pytest.mark.parametrize("form", SCALES)
def test_codes_are_right_whoever_widens_them(form: str) -> None:
    case = make(form, 20, 40, 70, "bf16", residual=False)
    for units in ("none", "e4m3fn"):
        hold(case, call(case, units=units))


@pytest.mark.parametrize("form", ["w4_zero", "w_fp8"])
def test_what_is_not_needed_is_empty_and_its_own(form: str) -> None:
    case = make(form, 5, 20, 33)
    back = (case.grad, Call(case.x, case.weight, case.bias, None, "none"))
    gx, gb = path_of(form).backward(*back, False, True)
    assert gx.shape == (0,)
    case.check_gradients([case.truth(torch.float32)[1][0], gb, case.grad])
    gx, gb = path_of(form).backward(*back, False, False)
    assert gx.shape == gb.shape == (0,)
    assert gx is not gb


@pytest.mark.parametrize("form", ["int8", "w_fp8"])
def test_empty_sizes(form: str) -> None:
    for m, n, k in ((0, 5, 7), (3, 0, 7), (3, 5, 0)):
        case = make(form, m, n, k, residual=False)
        back = (case.grad, Call(case.x, case.weight, case.bias, None, "none"))
        gx, gb = path_of(form).backward(*back, True, True)
        assert gx.shape == (m, k)
        assert not gx.any()
        assert gb.shape == (n,)


@pytest.mark.parametrize("form", OF_ANY_ORDER)
def test_any_strides(form: str) -> None:
    case = make(form, 20, 10, 64, "f32", residual=False)
    for gz in (case.grad.t().contiguous().t(), case.grad.repeat_interleave(2, 1)[:, ::2]):
        hold(case, call(case, gz=gz))
    case.grad = torch.full((), 0.5).expand(20, 10)  # what sum().backward() hands over
    hold(case, call(case))


def far(form: str, power: int) -> Case:
    """W by 2^power, gz by most of the inverse: gx is in the range of float16, and W is not."""
    case = make(form, 20, 40, 70, "f16", residual=False)
    case.weight = case.weight.replace(scale=case.weight.scale * 2.0**power)
    case.dense = case.weight.to_dense(torch.float64)
    case.grad = (case.grad * 2.0 ** (-power * 0.6)).half()
    return case


@pytest.mark.parametrize("power", [-20, 20])
@pytest.mark.parametrize("form", OF_ANY_ORDER)
def test_float16_serves_weights_of_any_scale(form: str, power: int, tmp_path: Path) -> None:
    case = far(form, power)
    hold(case, call(case))
    if form in ("w8_zero", "w4_zero", "w_fp8"):  # scales of rows
        old, new = (
            "RELATIVE: tl.constexpr = g.dtype == tl.float16",
            "RELATIVE: tl.constexpr = False",
        )
        absolute = plant(kernels_of(form), tmp_path, old, new, scaled_dot)
        with pytest.raises(AssertionError):
            hold(case, call(case, absolute))


def test_every_column_of_a_line_is_itself() -> None:
    """One weight at a time: a permutation of columns that is its own inverse would hide."""
    for bits, columns in ((8, 4), (4, 8)):
        for column in range(columns):
            q = torch.zeros(17, 40)
            q[3, 8 + column] = 5
            weight = QuantizedWeight.from_dense(torch.zeros(17, 40), bits, 32, True, "none")
            weight = weight.replace(values=pack(q, bits), scale=torch.ones_like(weight.scale))
            stored = (weight.values, weight.scale, weight.zero_point)
            gx = quantized_kernels.gradient(torch.eye(17), *stored, 40, bits, 32)
            assert torch.equal(gx, q)


@pytest.mark.parametrize("form", ["w4", "w_fp8"])
def test_offsets_past_32_bits(form: str, tmp_path: Path) -> None:
    case = make(form, 18, 40, 50, "f16", residual=False)
    hold(case, call(case, gz=in_far_rows(tmp_path, case.grad)))


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_bitwise_equal_from_run_to_run(form: str) -> None:
    case = make(form, 30, 40, 100)
    assert torch.equal(call(case), call(case))


def test_bad_arguments() -> None:
    gz, w = torch.randn(4, 5), torch.randn(5, 8)
    q, fp8 = QuantizedWeight.from_dense(w), Fp8Weight.from_dense(w)
    stored = (q.scale, q.zero_point, 8, 8, 0)
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        quantized_kernels.gradient(gz.double(), q.values, *stored)
    with pytest.raises(ValueError, match=r"values: expected device cpu, that of x; got meta"):
        quantized_kernels.gradient(gz, q.values.to("meta"), *stored)
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        fp8_kernels.gradient(gz.double(), fp8.values, fp8.scale, 8, "row")
    with pytest.raises(ValueError, match=r"values: expected device cpu, that of x; got meta"):
        fp8_kernels.gradient(gz, fp8.values.to("meta"), fp8.scale, 8, "row")


@pytest.mark.parametrize("arch", ARCHS)
def test_int8_and_int4_tiles_are_small(arch: str) -> None:
    """The scaled block of W stands in registers beside the sums."""
    for kind in ("w8_gradient", "w4_gradient"):
        for dtype in DTYPES.values():
            for m in (1, 10**6):
                tile = quantized_tiles.choose_config(arch, kind, dtype, m)
                assert tile.block_m <= 64
                assert tile.block_n <= 64
                assert tile.block_k <= 64


@pytest.mark.parametrize("arch", ARCHS)
def test_fp8_tiles_lie_within_a_block_of_the_weight(arch: str) -> None:
    for dtype in DTYPES.values():
        for m in (1, 10**6):
            tile = fp8_tiles.choose_config(arch, fp8_kernels.KIND, dtype, m)
            assert fp8_tiles.BLOCK % tile.block_n == 0
            assert fp8_tiles.BLOCK % tile.block_k == 0


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS: dict[str, tuple[str, str, str]] = {
    # int8 and int4
    "zero point added": ("w8_zero", "- zero.to(tl.int16)", "+ zero.to(tl.int16)"),
    "scale of the first group for all": ("w4_zero", "(col0 // GROUP) * N16", "col0 * 0"),
    "scale forgotten": ("w8", "* by[:, None]", "* 1.0"),
    "scales of the first rows for all": ("w4_row", "scale + at + n0 + rn", "scale + at + rn"),
    "last rows of W dropped": ("w8", "range(0, N, BLOCK_K)", "range(0, N - BLOCK_K, BLOCK_K)"),
    "N edge not masked": ("w8", "(n0 + rn < N)[None, :]", "(n0 + rn < N + 1)[None, :]"),
    "next columns by an int8 line": ("w4", "tile_k.to(tl.int64) * STEP", "col0 * 16"),
    "K edge written past": ("w8", "BLOCK_N + rc < K", "BLOCK_N + rc < K + 1"),
    "only the last step kept": ("w8", "tl.dot(g, scaled, acc,", "0 * acc + tl.dot(g, scaled,"),
    # fp8
    "scale of a row of codes forgotten": ("w_fp8", "* by[:, None]", "* 1.0"),
    "scales of the first rows of codes for all": ("w_fp8", "scale + n0 + rn", "scale + rn"),
    "scale of all forgotten": ("w_fp8_tensor", "acc *= tl.load(scale)", "acc *= 1.0"),
    "blocks of the first columns": ("w_fp8_block", "* GROUPS + col0 // SPAN", "* GROUPS"),
    "blocks of the first rows": ("w_fp8_block", "tl.cast(n0 // SPAN, tl.int64) * GROUPS", "0"),
    "last rows of codes dropped": (
        "w_fp8",
        "range(0, N, BLOCK_K)",
        "range(0, N - BLOCK_K, BLOCK_K)",
    ),
    "N edge of codes not masked": ("w_fp8", "(n0 + rn < N)[None, :]", "(n0 + rn < N + 1)[None, :]"),
    "K edge of codes written past": (
        "w_fp8",
        "mask=in_m[:, None] & in_k[None, :])",
        "mask=in_m[:, None] & (tile_k * BLOCK_N + rc < K + 1)[None, :])",
    ),
    "only the last step of codes kept": ("w_fp8", "tl.dot(g, scaled, acc,", "tl.dot(g, scaled,"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    form, old, new = FAULTS[fault]
    module = plant(kernels_of(form), tmp_path, old, new, scaled_dot)
    case = make(form, *ragged(form), "f32", residual=False)
    hold(case, call(case))
    with pytest.raises(CAUGHT):
        hold(case, call(case, module))


@pytest.mark.parametrize("form", ["w4_zero", "w_fp8_block"])
def test_a_copy_without_a_fault_passes(form: str, tmp_path: Path) -> None:
    case = make(form, *ragged(form), "f32", residual=False)
    hold(case, call(case, plant(kernels_of(form), tmp_path, "M,", "M,", scaled_dot)))
