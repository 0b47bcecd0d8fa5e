"""What is the Triton kernels' own in sparse_linear: blocks, strides, traffic, planted faults.

Their values by the public function are in test_values.py, beside those of other ways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


import bigops
from bigops import backend
from bigops.formats import checks
from bigops.formats.sparse import SparseWeight
from bigops.kernels.common import form_tiles
from bigops.kernels.sparse_linear import kernels as programs
from bigops.kernels.sparse_linear import launch as kernels
from bigops.ops.family import Call
from bigops.ops.sparse_linear import blocks as _sparse_blocks
from bigops.ops.sparse_linear import op
from bigops.ops.sparse_linear import triton as path
from tests.support import triton_interpreter
from tests.support.cases.compressed import Case, make
from tests.support.guarded import guarded
from tests.support.kernels_ran import expect
from tests.support.planted import CAUGHT, plant
from tests.support.traffic import counting

triton_interpreter.install()

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = ("16x1", "16x16", "32x32")
# What is stored, and the dtype of x: float32 values serve any.
KINDS = [("sparse_bf16", "bf16"), *(("sparse_float", dtype) for dtype in ("f32", "bf16", "f16"))]


def blocks_of(weight: SparseWeight) -> kernels.Blocks:
    found = _sparse_blocks.find(weight)
    assert found is not None
    return found


def run(case: Case) -> str:
    """Forward and backward as the ops run on a GPU, outputs between guards; gives the pattern."""
    blocks = blocks_of(case.weight)
    pattern = f"{blocks.height}x{blocks.rows.width}"
    name = f"{checks.short(case.x.dtype)}.{checks.short(case.weight.values.dtype)}.{pattern}"
    with guarded(), expect(f"triton.sparse_linear.{name}"):
        y = op._cuda(case.x, *case.storage, case.bias, case.residual, case.name)
    case.check_forward(y)
    needs = (True, True, case.bias is not None)
    with guarded(), expect(f"triton.sparse_linear_backward.{name}"):
        found = op.gradients._cuda(case.grad, case.x, *case.storage, case.bias, case.name, *needs)
    gx, gv, gb = found
    grads = [gx, gv, None if case.bias is None else gb]
    case.check_gradients([*grads, None if case.residual is None else case.grad], stored=True)
    return pattern


def trained(form: str, *shape: Any, **options: Any) -> Case:
    return make(form, *shape, values=True, **options)


def seen(pattern: str, form: str) -> str:
    """The pattern as the kernel's name has it: 16x1 is stored in words."""
    return "16x2" if (pattern, form) == ("16x1", "sparse_bf16") else pattern


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), KINDS)
@pytest.mark.parametrize("pattern", BLOCKS)
def test_wide_sweep(pattern: str, form: str, dtype: str) -> None:
    for shape, name in (((70, 120, 130), "silu"), ((33, 80, 200), "none")):
        case = trained(form, *shape, dtype, name, pattern=pattern, sparsity=0.8)
        assert run(case) == seen(pattern, form)


def test_lines_of_very_different_length() -> None:
    """A full row of blocks beside empty ones, and a column likewise: the longest goes first."""
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[3], mask[5, 2], mask[0, 2] = True, True, True
    for dtype in (torch.float32, torch.bfloat16):
        weight = SparseWeight.from_mask(torch.randn(96, 128), mask, dtype, (16, 16))
        blocks = blocks_of(weight)
        assert blocks.rows.order.tolist() == [3, 0, 5, 1, 2, 4]
        assert blocks.columns.order.tolist()[0] == 2
        assert blocks.rows.first.diff().tolist() == [1, 0, 0, 8, 0, 1]
        assert blocks.task_line.tolist() == [0, 3, 3, 5]  # 64 columns, then the next task
        case = trained("sparse_float", 9, 96, 128, "f32", "silu", pattern="16x16")
        case.weight, case.dense = weight, weight.to_dense(torch.float64)
        if dtype == torch.float32:
            run(case)


def test_any_strides() -> None:
    case = trained("sparse_float", 20, 48, 64, "f32", "gelu", pattern="16x16")
    case.x = case.x.t().contiguous().t()
    case.residual = case.residual[:1].expand(20, 48)
    case.grad = case.grad[:, :1].expand(20, 48)
    run(case)
    plain = trained("sparse_float", 20, 48, 64, "f32", pattern="32x32", bias=False, residual=False)
    plain.grad = torch.ones(()).expand(20, 48)
    run(plain)


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """Rows 2^27 elements apart in a sparse file: row 17 starts past element 2^31."""
    step, m, k = 1 << 27, 18, 40
    size = step * (m - 1) + k
    storage = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    case = trained("sparse_float", m, 20, k, "f16", "gelu", pattern="16x16", sparsity=0.3)
    x = storage.as_strided((m, k), (step, 1))
    x.copy_(case.x)
    case.x = x
    run(case)


def test_bitwise_equal_from_run_to_run() -> None:
    case = trained("sparse_bf16", 40, 64, 96, "bf16", "gelu", pattern="16x16")
    args = (case.x, *case.storage, case.bias, case.residual, case.name)
    assert torch.equal(op._cuda(*args), op._cuda(*args))


# where blocks lie --------------------------------------------------------------------------


def test_what_is_in_blocks_is_seen_whatever_made_it() -> None:
    """32x32 by a mask of 16x16 blocks or of single entries; 16x16 where two halves differ."""
    w = torch.randn(64, 96)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = True
    for side in (32, 16, 1):
        finer = mask.repeat_interleave(32 // side, 0).repeat_interleave(32 // side, 1)
        weight = SparseWeight.from_mask(w, finer, torch.float32, (side, side))
        blocks = blocks_of(weight)
        assert (blocks.height, blocks.rows.width) == (32, 32)
        assert blocks.rows.across.tolist() == [1, 2]
        assert blocks.columns.first.tolist() == [0, 0, 1, 2]
    finer = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    finer[0, 0] = True
    blocks = blocks_of(SparseWeight.from_mask(w, finer, torch.float32, (16, 16)))
    assert (blocks.height, blocks.rows.width, blocks.columns.width) == (16, 16, 16)
    single = torch.zeros(4, 96, dtype=torch.bool)
    single[0, 3], single[2, 3], single[2, 50], single[2, 51] = True, True, True, True
    blocks = blocks_of(SparseWeight.from_mask(w, single, torch.float32, (16, 1)))
    assert (blocks.height, blocks.rows.width, blocks.columns.width) == (16, 1, 16)
    assert blocks.rows.across.tolist() == [3, 3, 50, 51]
    assert blocks.columns.first.tolist() == [0, 2, 2, 2, 3, 3, 3]
    assert (blocks.columns.step >= 0).sum(1).tolist() == [1, 1, 2]


@pytest.mark.parametrize("pattern", ["1x1", "1x4", "4x1", "2:4"])
def test_other_patterns_are_served_by_the_reference_and_explain_says_so(pattern: str) -> None:
    case = trained("sparse_float", 4, 64, 64, pattern=pattern)
    said = bigops.explain("sparse_linear", case.x, case.weight, device="sm_90")
    assert said.kernel == "reference.sparse_linear"
    group = 4 if pattern == "4x1" else 1
    assert f"(16x1, 16x16, 32x32); got {group} by {group}" in said.reason
    with backend.record() as names:
        case.check_forward(op._cuda(case.x, *case.storage, case.bias, case.residual, case.name))
        found = op.gradients._cuda(
            case.grad, case.x, *case.storage, case.bias, case.name, True, True, True
        )
    assert names == ["reference.sparse_linear", "reference.sparse_linear_backward"]
    gx, gv, gb = found
    grads = [gx, gv, None if case.bias is None else gb]
    case.check_gradients([*grads, None if case.residual is None else case.grad], stored=True)


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explain_names_kernel_and_config(dtype: torch.dtype, pattern: str) -> None:
    case = make(
        "sparse_bf16" if dtype == torch.bfloat16 else "sparse_float",
        64,
        128,
        256,
        "bf16",
        pattern=pattern,
    )
    stored = "bf16" if dtype == torch.bfloat16 else "f32"
    said = bigops.explain("sparse_linear", case.x, case.weight, device="sm_90")
    pattern = seen(pattern, "sparse_bf16" if dtype == torch.bfloat16 else "sparse_float")
    assert said.kernel == f"triton.sparse_linear.bf16.{stored}.{pattern}"
    config = form_tiles.choose_config("sparse_linear", "sm_90", "forward", dtype, 64, 32)
    assert said.config == {**config.of_one_form(), "file": "sparse_linear/sm_90.json"}
    assert said.reason == (
        f"aligned {pattern} {stored} tile for 64 rows from kernels/configs/sparse_linear/sm_90.json"
    )


def test_explain_says_what_no_gpu_kernel_serves() -> None:
    case = make("sparse_int8", 4, 32, 64, pattern="16x16")
    qparams = torch.tensor([0.1, 128.0])
    u8 = torch.zeros(4, 64, dtype=torch.uint8)
    why_not = "no GPU kernel for a call with qparams"
    for x, options, name, why in (
        (case.x, {}, "sparse_linear", "no GPU kernel for int8 values"),
        (
            case.x,
            {"y_qparams": qparams},
            "sparse_linear_u8",
            why_not,
        ),
        (u8, {"x_qparams": qparams}, "sparse_linear_u8", why_not),
    ):
        said = bigops.explain("sparse_linear", x, case.weight, device="sm_90", **options)
        assert said.kernel == f"reference.{name}"
        assert why in said.reason
    meta = case.weight.replace(
        values=torch.empty(case.weight.values.shape, device="meta"), scale=None, sums=None
    )
    assert "meta device" in path.blocks_of(Call(case.x, meta), case.x.device)[1]


def test_blocks_are_found_once_and_anew_when_the_storage_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    inner = _sparse_blocks._find
    monkeypatch.setattr(_sparse_blocks, "_find", lambda *a: calls.append(1) or inner(*a))
    weight = make("sparse_float", 4, 48, 64, pattern="16x16", sparsity=0.5).weight
    first = blocks_of(weight)
    assert blocks_of(weight.replace(values=weight.values * 2)) is first
    assert len(calls) == 1
    with torch.inference_mode():
        assert blocks_of(weight) is first
    weight.rows.add_(0)  # a write, as load_state_dict makes one
    assert blocks_of(weight) is not first
    assert len(calls) == 2
    with torch.inference_mode():
        made = make("sparse_float", 4, 48, 64, pattern="16x16", sparsity=0.5).weight
        assert blocks_of(made) is blocks_of(made)
    assert len(calls) == 3


def test_broken_storage_is_refused() -> None:
    case = make("sparse_float", 4, 48, 64, pattern="16x16", sparsity=0.5)
    weight, rest = case.weight, (case.bias, case.residual, case.name)
    wrong = weight.replace(index=torch.full_like(weight.index, 64))
    with pytest.raises(ValueError, match=r"index: expected words below 64; got 64"):
        op._cuda(case.x, *wrong.arguments, *rest)
    wrong = weight.replace(ptr=weight.ptr.flip(0))
    with pytest.raises(ValueError, match=r"ptr: expected values that rise"):
        op._cuda(case.x, *wrong.arguments, *rest)


def test_bad_arguments() -> None:
    weight = make("sparse_float", 4, 32, 64, pattern="32x32").weight
    blocks, x = blocks_of(weight), torch.randn(4, 64)
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        kernels.forward(x.double(), weight.values, blocks, 32)
    with pytest.raises(TypeError, match=r"values: expected torch.float32, or .*; got torch.int8"):
        kernels.forward(x, weight.values.to(torch.int8), blocks, 32)
    with pytest.raises(TypeError, match=r"bias: expected torch.float32, that of x; got .*float16"):
        kernels.forward(x, weight.values, blocks, 32, torch.zeros(32).half())
    with pytest.raises(ValueError, match=r"gz: expected device cpu, that of x; got meta"):
        kernels.sampled(torch.empty(4, 32, device="meta"), x, weight.values, blocks)
    with pytest.raises(ValueError, match=r"activation: expected the code of no gated pair; got 8"):
        kernels.forward(x, weight.values, blocks, 32, activation=8)


# bytes -------------------------------------------------------------------------------------


def test_bytes_moved_are_those_of_the_stored_blocks() -> None:
    """What is not stored is not read, and y alone is written; indices come on top."""
    m, n, k = 40, 64, 96
    case = make(
        "sparse_bf16", m, n, k, "bf16", bias=False, residual=False, pattern="32x32", sparsity=0.5
    )
    blocks = blocks_of(case.weight)
    stored = blocks.rows.across.numel()
    assert 0 < stored < 6
    config = form_tiles.choose_config(
        "sparse_linear", "interpreter", "forward", torch.bfloat16, m, 32
    )
    with counting() as traffic:
        kernels.forward(case.x, case.weight.values, blocks, n, config=config)
    found_read, found_written = traffic.sums("all")
    assert found_written == m * n * 2
    tiles_m = -(-m // config.block_m)
    indices = found_read - 2 * (stored * 32 * m + tiles_m * stored * 1024)
    assert 0 < indices < tiles_m * stored * 32 * 4 * 2


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS = {
    "rows and words swapped": ("(0, 2, 4, 1, 3)", "(0, 1, 2, 3, 4)"),
    "columns of a word swapped in the transposed product": ("(0, 1, 3, 2, 4)", "(0, 2, 3, 1, 4)"),
    "samples in another order": ("(0, 3, 1, 4, 2)", "(0, 1, 3, 4, 2)"),
    "last blocks of a line dropped": ("range(0, end - begin,", "range(0, end - begin - ENTRIES,"),
    "blocks of the next line taken along": ("< end", "< end + 1"),
    "lower half of the last rows read": ("mask = (at >= 0)[:, None]", "mask = (at >= -1)[:, None]"),
    "x past the last column": ("(inside & (at < K))[None, :]", "inside[None, :]"),
    "last word not masked": ("(WORDS - column * (WIDTH // C))", "(WORDS + column * 0)"),
    "a task takes the wrong blocks": ("tl.load(task_first", "1 + tl.load(task_first"),
    "last rows of gz dropped": ("range(0, M, BLOCK_K)", "range(0, M - BLOCK_K, BLOCK_K)"),
    "words of a block in each other's place": ("PARTS + re, mask", "PARTS + (re ^ 1), mask"),
    "one line twice": ("tl.load(order + tl.program_id(0) // tiles_m)", "tl.load(order)"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    copy = plant(kernels, tmp_path, *FAULTS[fault], programs)
    for name in ("forward", "transposed", "sampled"):
        monkeypatch.setattr(kernels, name, getattr(copy, name))
    pattern, form, dtype = "32x32", "sparse_bf16", "bf16"
    if fault.startswith("words"):
        pattern, form, dtype = "16x1", "sparse_float", "f32"
    case = trained(form, 35, 40, 70, dtype, "silu", pattern=pattern, sparsity=0.0)
    if fault.startswith("words"):
        case = trained(form, 35, 40, 70, dtype, "silu", pattern=pattern)
    with pytest.raises(CAUGHT):
        run(case)


def test_a_copy_without_a_fault_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = plant(kernels, tmp_path, "M,", "M,", programs)
    for name in ("forward", "transposed", "sampled"):
        monkeypatch.setattr(kernels, name, getattr(copy, name))
    case = trained("sparse_bf16", 35, 40, 70, "bf16", "silu", pattern="32x32", sparsity=0.0)
    run(case)
