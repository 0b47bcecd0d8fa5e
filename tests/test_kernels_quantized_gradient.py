"""The Triton kernel of gx = gz W in quantized_linear: tiles, strides, range, planted faults.

Its values by the public function are in test_quantized_linear.py, beside those of other ways.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from bigops.formats.quantized import QuantizedWeight, pack
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.quantized_linear import gradient as kernels
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from bigops.ops.quantized_linear import triton as road
from tests import triton_interpreter
from tests.compressed_cases import DTYPES, Case, make
from tests.guarded import guarded
from tests.planted import plant

triton_interpreter.install()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on masked lanes
]
ONE_OF_EACH = ("w8_zero", "w8_group", "w4_zero", "w4_row")  # storage, groups and zero points


def stored(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors that the kernel reads."""
    return weight.values, weight.scale, weight.zero_point


def call(
    case: Case,
    module: ModuleType = kernels,
    config: TileConfig | None = None,
    gz: Tensor | None = None,
) -> Tensor:
    """The kernel on grad as it is, the output between guards."""
    weight = case.weight
    form = (weight.k, weight.bits, weight.group)
    with guarded():
        gx: Tensor = module.gradient(
            case.grad if gz is None else gz, *stored(weight), *form, config
        )
    return gx


def hold(case: Case, gx: Tensor) -> None:
    """``gx`` against the rule, where the activation is "none": gz is grad then."""
    bias, residual = case.truth(torch.float64)[1][1:]
    rest = [None if t is None else t.to(gx.dtype) for t in (bias, residual)]
    case.check_gradients([gx, *rest], stored=True)


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("tile", [(16, 64, 64), (64, 128, 32), (32, 32, 128)], ids=str)
def test_tiles_of_other_sizes(tile: tuple[int, ...], form: str) -> None:
    case = make(form, 35, 70, 85, "f16" if form == "w4_zero" else "bf16", residual=False)
    hold(case, call(case, config=TileConfig(*tile, 8, 4, 3, 1)))


def test_what_is_not_needed_is_empty_and_its_own() -> None:
    case = make("w4_zero", 5, 20, 33)
    gx, gb = road.backward(case.grad, case.call, False, True)
    assert gx.shape == (0,)
    case.check_gradients([case.truth(torch.float32)[1][0], gb, case.grad])
    gx, gb = road.backward(case.grad, case.call, False, False)
    assert gx.shape == gb.shape == (0,)
    assert gx is not gb


def test_empty_sizes() -> None:
    for m, n, k in ((0, 5, 7), (3, 0, 7), (3, 5, 0)):
        case = make("int8", m, n, k, residual=False)
        gx, gb = road.backward(case.grad, case.call, True, True)
        assert gx.shape == (m, k)
        assert not gx.any()
        assert gb.shape == (n,)


@pytest.mark.parametrize("form", ["w8_zero", "w4_zero"])
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
@pytest.mark.parametrize("form", ["w8_zero", "w4_zero"])
def test_float16_serves_weights_of_any_scale(form: str, power: int, tmp_path: Path) -> None:
    case = far(form, power)
    hold(case, call(case))
    old = "RELATIVE: tl.constexpr = gz.dtype.element_ty == tl.float16"
    absolute = plant(kernels, tmp_path, old, "RELATIVE: tl.constexpr = False")
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
            gx = kernels.gradient(torch.eye(17), *stored(weight), 40, bits, 32)
            assert torch.equal(gx, q)


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """Rows 2^27 elements apart in a sparse file: row 17 starts past element 2^31."""
    step, m, n = 1 << 27, 18, 40
    size = step * (m - 1) + n
    storage = torch.from_file(str(tmp_path / "gz"), shared=True, size=size, dtype=torch.float16)
    case = make("w4", m, n, 50, "f16", residual=False)
    gz = storage.as_strided((m, n), (step, 1))
    gz.copy_(case.grad)
    hold(case, call(case, gz=gz))


def test_bitwise_equal_from_run_to_run() -> None:
    for form in ONE_OF_EACH:
        case = make(form, 30, 40, 100)
        assert torch.equal(call(case), call(case))


def test_bad_arguments() -> None:
    weight = QuantizedWeight.from_dense(torch.randn(5, 8))
    gz = torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        kernels.gradient(gz.double(), *stored(weight), 8, 8, 0)
    with pytest.raises(ValueError, match=r"values: expected device cpu, that of x; got meta"):
        elsewhere = weight.replace(values=weight.values.to("meta"))
        kernels.gradient(gz, *stored(elsewhere), 8, 8, 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_tiles_are_small(arch: str) -> None:
    """The scaled block of W stands in registers beside the sums."""
    for kind in ("w8_gradient", "w4_gradient"):
        for dtype in DTYPES.values():
            for m in (1, 10**6):
                tile = quantized_tiles.choose_config(arch, kind, dtype, m)
                assert tile.block_m <= 64
                assert tile.block_n <= 64
                assert tile.block_k <= 64


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS: dict[str, tuple[str, str, str]] = {
    "zero point added": ("w8_zero", "- zero.to(tl.int16)", "+ zero.to(tl.int16)"),
    "scale of the first group for all": ("w4_zero", "(col0 // GROUP) * N16", "col0 * 0"),
    "scale forgotten": ("w8", "* by[:, None]", "* 1.0"),
    "scales of the first rows for all": ("w4_row", "scale + at + n0 + rn", "scale + at + rn"),
    "last rows of W dropped": ("w8", "range(0, N, BLOCK_K)", "range(0, N - BLOCK_K, BLOCK_K)"),
    "N edge not masked": ("w8", "(n0 + rn < N)[None, :]", "(n0 + rn < N + 1)[None, :]"),
    "next columns by an int8 line": ("w4", "tile_k.to(tl.int64) * STEP", "col0 * 16"),
    "K edge written past": ("w8", "BLOCK_N + rc < K", "BLOCK_N + rc < K + 1"),
    "only the last step kept": ("w8", "acc = tl.dot(g, w, acc,", "acc = 0 * acc + tl.dot(g, w,"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    form, old, new = FAULTS[fault]
    module = plant(kernels, tmp_path, old, new)
    case = make(form, 37, 75, 134, "f32", residual=False)
    hold(case, call(case))
    with pytest.raises((AssertionError, IndexError, RuntimeError, InterpreterError)):
        hold(case, call(case, module))


def test_a_copy_without_a_fault_passes(tmp_path: Path) -> None:
    case = make("w4_zero", 37, 75, 134, "f32", residual=False)
    hold(case, call(case, plant(kernels, tmp_path, "M,", "M,")))
