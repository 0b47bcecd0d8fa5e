"""The Triton kernel of gx = gz W in fp8_linear: formats, tiles, strides, range, planted faults.

It is called as a GPU calls it, by the backward of the op, and by itself on the gradient as it is.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from bigops.formats.fp8 import Fp8Weight
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.fp8_linear import gradient as kernels
from bigops.kernels.fp8_linear import tiles as fp8_tiles
from bigops.ops.fp8_linear import triton as road
from tests import triton_interpreter
from tests.compressed_cases import DTYPES, FP8, Case, make
from tests.guarded import guarded
from tests.kernels_ran import expect
from tests.planted import plant

triton_interpreter.install()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on masked lanes
]
ONE_OF_EACH = ("w_fp8", "w_fp8_block", "w_fp8_tensor")
RAGGED = (35, 150, 140)  # past one block of 128 rows and columns of W


def call(
    case: Case,
    module: ModuleType = kernels,
    config: TileConfig | None = None,
    gz: Tensor | None = None,
    units: str | None = None,
) -> Tensor:
    """The kernel on grad as it is, the output between guards."""
    weight = case.weight
    stored = (weight.values, weight.scale, weight.k, weight.scales)
    with guarded():
        gx: Tensor = module.gradient(case.grad if gz is None else gz, *stored, config, units)
    return gx


def hold(case: Case, gx: Tensor) -> None:
    """``gx`` against the rule, where the activation is "none": gz is grad then."""
    bias, residual = case.truth(torch.float64)[1][1:]
    rest = [None if t is None else t.to(gx.dtype) for t in (bias, residual)]
    case.check_gradients([gx, *rest], stored=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FP8)
def test_every_format_and_dtype(form: str, dtype: str) -> None:
    case = make(form, 33, 40, 70, dtype, "gelu")
    with guarded(), expect(f"triton.fp8_linear_backward.{dtype}"):
        gx, gb = road.backward(case.grad, case.call, True, True)
    case.check_gradients([gx, gb, case.grad], stored=True)


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("tile", [(16, 64, 64), (64, 128, 32), (32, 32, 128)], ids=str)
def test_tiles_of_other_sizes(tile: tuple[int, ...], form: str) -> None:
    case = make(form, *RAGGED, "f16" if form == "w_fp8_block" else "bf16", residual=False)
    hold(case, call(case, config=TileConfig(*tile, 8, 4, 3, 1)))


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_codes_are_right_whoever_widens_them(form: str) -> None:
    case = make(form, 20, 40, 70, "bf16", residual=False)
    for units in ("none", "e4m3fn"):
        hold(case, call(case, units=units))


def test_what_is_not_needed_is_empty_and_its_own() -> None:
    case = make("w_fp8", 5, 20, 33)
    gx, gb = road.backward(case.grad, case.call, False, True)
    assert gx.shape == (0,)
    case.check_gradients([case.truth(torch.float32)[1][0], gb, case.grad])
    gx, gb = road.backward(case.grad, case.call, False, False)
    assert gx.shape == gb.shape == (0,)
    assert gx is not gb


def test_empty_sizes() -> None:
    for m, n, k in ((0, 5, 7), (3, 0, 7), (3, 5, 0)):
        case = make("w_fp8", m, n, k, residual=False)
        gx, gb = road.backward(case.grad, case.call, True, True)
        assert gx.shape == (m, k)
        assert not gx.any()
        assert gb.shape == (n,)


@pytest.mark.parametrize("form", ONE_OF_EACH)
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
@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_float16_serves_weights_of_any_scale(form: str, power: int, tmp_path: Path) -> None:
    case = far(form, power)
    hold(case, call(case))
    if form == "w_fp8":
        old = "RELATIVE: tl.constexpr = gz.dtype.element_ty == tl.float16"
        absolute = plant(kernels, tmp_path, old, "RELATIVE: tl.constexpr = False")
        with pytest.raises(AssertionError):
            hold(case, call(case, absolute))


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """Rows 2^27 elements apart in a sparse file: row 17 starts past element 2^31."""
    step, m, n = 1 << 27, 18, 40
    size = step * (m - 1) + n
    storage = torch.from_file(str(tmp_path / "gz"), shared=True, size=size, dtype=torch.float16)
    case = make("w_fp8", m, n, 50, "f16", residual=False)
    gz = storage.as_strided((m, n), (step, 1))
    gz.copy_(case.grad)
    hold(case, call(case, gz=gz))


def test_bitwise_equal_from_run_to_run() -> None:
    for form in ONE_OF_EACH:
        case = make(form, 30, 40, 100)
        assert torch.equal(call(case), call(case))


def test_bad_arguments() -> None:
    weight = Fp8Weight.from_dense(torch.randn(5, 8))
    gz, stored = torch.randn(4, 5), (weight.values, weight.scale)
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        kernels.gradient(gz.double(), *stored, 8, "row")
    with pytest.raises(ValueError, match=r"values: expected device cpu, that of x; got meta"):
        kernels.gradient(gz, weight.values.to("meta"), weight.scale, 8, "row")


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_tiles_lie_within_a_block_of_the_weight(arch: str) -> None:
    for dtype in DTYPES.values():
        for m in (1, 10**6):
            tile = fp8_tiles.choose_config(arch, kernels.KIND, dtype, m)
            assert fp8_tiles.BLOCK % tile.block_n == 0
            assert fp8_tiles.BLOCK % tile.block_k == 0


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS: dict[str, tuple[str, str, str]] = {
    "scale forgotten": ("w_fp8", "* by[:, None]", "* 1.0"),
    "scales of the first rows for all": ("w_fp8", "scale + n0 + rn", "scale + rn"),
    "scale of all forgotten": ("w_fp8_tensor", "acc *= tl.load(scale)", "acc *= 1.0"),
    "blocks of the first columns": ("w_fp8_block", "* GROUPS + col0 // SPAN", "* GROUPS"),
    "blocks of the first rows": ("w_fp8_block", "tl.cast(n0 // SPAN, tl.int64) * GROUPS", "0"),
    "last rows of W dropped": ("w_fp8", "range(0, N, BLOCK_K)", "range(0, N - BLOCK_K, BLOCK_K)"),
    "N edge not masked": ("w_fp8", "(n0 + rn < N)[None, :]", "(n0 + rn < N + 1)[None, :]"),
    "K edge written past": (
        "w_fp8",
        "mask=in_m[:, None] & in_k[None, :])",
        "mask=in_m[:, None] & (tile_k * BLOCK_N + rc < K + 1)[None, :])",
    ),
    "only the last step kept": ("w_fp8", "acc = tl.dot(g, scaled, acc,", "acc = tl.dot(g, scaled,"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    form, old, new = FAULTS[fault]
    module = plant(kernels, tmp_path, old, new)
    case = make(form, *RAGGED, "f32", residual=False)
    hold(case, call(case))
    with pytest.raises((AssertionError, IndexError, RuntimeError, InterpreterError)):
        hold(case, call(case, module))


def test_a_copy_without_a_fault_passes(tmp_path: Path) -> None:
    case = make("w_fp8_block", *RAGGED, "f32", residual=False)
    hold(case, call(case, plant(kernels, tmp_path, "M,", "M,")))
