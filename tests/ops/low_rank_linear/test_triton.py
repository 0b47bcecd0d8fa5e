"""What is the Triton kernel's own in low_rank_linear: tiles, strides, traffic, planted faults.

Its values by the public function are in test_values.py, beside those of all other ways.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


import bigops
from bigops import backend
from bigops.kernels.common import tile_walk, tiles
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.low_rank_linear import kernel as kernels
from bigops.kernels.low_rank_linear import model
from bigops.ops.low_rank_linear import triton as path
from tests.kernels.test_gpu_compile import GOLDEN
from tests.support import triton_interpreter
from tests.support.cases.linear import PLAIN
from tests.support.cases.low_rank import LowRankCase, make
from tests.support.guarded import guarded
from tests.support.kernel_checks import in_far_rows
from tests.support.kernels_ran import expect
from tests.support.planted import CAUGHT, plant
from tests.support.traffic import counting

triton_interpreter.install()

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NEEDS = (True, True, True, True, True)


def run(case: LowRankCase, form: str = "fused") -> None:
    """Forward with parts and backward by the path that a GPU takes, outputs between guards."""
    _, _, _, bias, residual, base = case.inputs
    dtype = next(name for name, d in DTYPES.items() if d == case.call.dtype)
    needs = (True, True, True, base is not None, bias is not None)
    with guarded(), expect(f"triton.low_rank_linear.{dtype}.{form}"):
        y, t, z = path.forward(case.call, True)
    assert t is not None
    assert (z is None) == (case.name == "none")
    case.check_forward(y)
    with guarded(), expect(f"triton.low_rank_linear_backward.{dtype}.{form}"):
        gx, gu, gv, gbase, gb = path.backward(case.grad, case.call, t, z, *needs)
    case.check_gradients(
        [
            gx,
            gu,
            gv,
            None if bias is None else gb,
            None if residual is None else case.grad,
            None if base is None else gbase,
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in PLAIN if name != "relu"])
def test_wide_sweep(name: str, dtype: str) -> None:
    """Without relu: where z is within rounding of its kink, either slope is right."""
    run(make(77, 70, 90, 20, DTYPES[dtype], name, base=dtype != "f16", scale=0.5))


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
def test_no_extras_and_no_parts(base: bool) -> None:
    case = make(33, 20, 35, 6, torch.bfloat16, "silu", base=base, extras=False)
    y, t, z = path.forward(case.call, False)
    assert t is None
    assert z is None
    case.check_forward(y)


def test_a_tile_larger_than_the_problem_and_several_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(40, 150, 50, 20, torch.float16, "gelu", base=True)
    x, u, v, bias, residual, base = case.inputs
    for fill, parts in ((1, 1), (4, 4)):  # all columns by one program; split among two
        monkeypatch.setattr(model, "FILL", fill)
        config = TileConfig(64, 64, 32, 8, 4, 3, parts)
        assert model.span_of(40, 150, config) == (3 if fill == 1 else 1)
        found = kernels.forward(x, u, v, bias, residual, base, 3, 1.0, True, config)
        case.check_forward(found.y)


def test_any_strides() -> None:
    case = make(20, 33, 50, 9, torch.float32, "gelu", base=True)
    x, u, v, bias, residual, base = case.inputs
    strided = (
        x.t().contiguous().t(),
        u.repeat_interleave(2, 1)[:, ::2],
        v.t().contiguous().t(),
        torch.stack([bias, bias], dim=1)[:, 0],
        residual[:1].expand(20, 33),
        base.repeat_interleave(3, 1)[:, 1::3],
    )
    run(LowRankCase(strided, case.grad[:, :1].expand(20, 33), "gelu", 1.5))
    plain = make(20, 33, 50, 9)
    run(LowRankCase(plain.inputs, torch.ones(()).expand(20, 33), "none", 1.0))


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    case = make(18, 20, 40, 5, torch.float16, "gelu", base=True)
    x, *others = case.inputs
    run(LowRankCase((in_far_rows(tmp_path, x), *others), case.grad, "gelu", 1.0))


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
def test_a_rank_that_does_not_fit_goes_by_dense_launches(base: bool) -> None:
    for name in ("none", "gelu"):
        run(make(9, 40, 45, 33, torch.float32, name, base=base, scale=0.5), "composed")
    said = bigops.explain(
        "low_rank_linear",
        torch.empty(64, 4096, device="meta", dtype=torch.bfloat16),
        torch.empty(4096, 1024, device="meta", dtype=torch.bfloat16),
        torch.empty(1024, 4096, device="meta", dtype=torch.bfloat16),
        base=torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16) if base else None,
        device="sm_90",
    )
    assert said.kernel == "triton.low_rank_linear.bf16.composed"
    assert "a rank of 1024 does not fit on chip" in said.reason
    assert f"{'three' if base else 'two'} launches of the dense kernel" in said.reason


def test_large_ranks_ask_for_factors_in_wide_words() -> None:
    for rank, fused in ((60, True), (192, True), (200, False)):
        x, u, v = (
            torch.empty(*shape, device="meta", dtype=torch.bfloat16)
            for shape in ((4096, 1024), (512, rank), (rank, 1024))
        )
        said = bigops.explain("low_rank_linear", x, u, v, device="sm_90")
        assert said.kernel.endswith("fused" if fused else "composed"), rank


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_names_kernel_and_config(dtype: str, base: bool) -> None:
    x, u, v, w = (
        torch.empty(*shape, device="meta", dtype=DTYPES[dtype])
        for shape in ((4096, 1024), (512, 32), (32, 1024), (512, 1024))
    )
    said = bigops.explain("low_rank_linear", x, u, v, base=w if base else None, device="sm_90")
    assert said.kernel == f"triton.low_rank_linear.{dtype}.fused"
    config = model.fits("sm_90", DTYPES[dtype], 4096, 32, base, True)
    assert said.config == {**config.of_one_form(), "file": "low_rank_linear/sm_90.json"}
    assert "and a rank of 32 from kernels/configs/low_rank_linear/sm_90.json" in said.reason
    double = bigops.explain("low_rank_linear", x.double(), u.double(), v.double(), device="sm_90")
    assert double.kernel == "reference.low_rank_linear"
    assert "float64" in double.reason


def test_bad_arguments() -> None:
    x, u, v, _, residual, _ = make(4, 6, 8, 3).inputs
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        kernels.forward(x.double(), u, v)
    with pytest.raises(TypeError, match=r"u: expected torch.float32 .*; got torch.float16"):
        kernels.forward(x, u.half(), v)
    with pytest.raises(ValueError, match=r"activation: expected the code of no gated pair; got 8"):
        kernels.forward(x, u, v, activation=8)
    with pytest.raises(ValueError, match=r"preact: expected a tensor .*; got None"):
        kernels.backward(residual, x, u, v, None, torch.ones(4, 3), None, 3, 1.0, *NEEDS)


@pytest.mark.parametrize("which", range(5))
def test_only_the_asked_gradients_are_made(which: int) -> None:
    case = make(20, 18, 9, 4, name="silu", base=True)
    x, u, v, bias, _, base = case.inputs
    found = kernels.forward(x, u, v, bias, None, base, 5, 1.0, True)
    saved = (case.grad, x, u, v, base, found.inner, found.preact, 5, 1.0)
    full = kernels.backward(*saved, *NEEDS)[:5]
    some = kernels.backward(*saved, *(i == which for i in range(5)))[:5]
    assert [part.shape == (0,) for part in some] == [i != which for i in range(5)]
    # Other flags are another kernel, or another order of sums: held by the numerics rule.
    gx, gu, gv, gb, gbase = (some[i] if i == which else whole for i, whole in enumerate(full))
    case.check_gradients([gx, gu, gv, gb, case.grad, gbase])


# bytes -------------------------------------------------------------------------------------


def traffic(
    m: int, n: int, k: int, rank: int, based: bool, itemsize: int, config: TileConfig
) -> tuple[int, int]:
    """Bytes of `forward` by formula: (read, written), each operand of a program read once.

    Written is y alone, whatever the rank. Read is x once for each span of columns, the factors
    and the base once for each tile of rows; an L2 cache takes what neighbours share.
    """
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // config.block_n)
    spans = -(-tiles_n // model.span_of(m, n, config))
    x_reads = spans + (tiles_n if based else 0)
    read = x_reads * m * k + tiles_m * (spans * rank * k + rank * n + (n * k if based else 0))
    return itemsize * read, itemsize * m * n


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
def test_bytes_moved_are_those_of_the_formula(base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows enough for the device x is read once and y alone is written, t nowhere."""
    monkeypatch.setattr(model, "FILL", 2)
    m, n, k, rank = 70, 80, 64, 20
    case = make(m, n, k, rank, torch.bfloat16, extras=False, base=base)
    x, u, v, *_, b = case.inputs
    config = model.fits("interpreter", torch.bfloat16, m, rank, base, True)
    with counting() as counted:
        kernels.forward(x, u, v, None, None, b, config=config)
    read, written = traffic(m, n, k, rank, base, 2, config)
    assert counted.sums("all") == (read, written)
    assert written == y_bytes(case)
    if not base:
        tiles_m = -(-m // config.block_m)
        assert read == 2 * (m * k + tiles_m * rank * (k + n))


def y_bytes(case: LowRankCase) -> int:
    return case.grad.numel() * 2


def test_large_calls_move_the_ideal_bytes() -> None:
    """By formula: factors read once for each tile of rows stay below a tenth of x and y."""
    m, n, k, rank = 65536, 4096, 4096, 64
    config = model.fits("sm_90", torch.bfloat16, m, rank, False, True)
    moved = sum(traffic(m, n, k, rank, False, 2, config))
    factors = -(-m // config.block_m) * rank * (n + k) * 2  # from L2 but for the first time
    ideal = 2 * (m * k + m * n + rank * (n + k))
    assert moved - factors + 2 * rank * (n + k) == ideal


@pytest.mark.parametrize("arch", [name for name in tiles.tables() if name != "interpreter"])
def test_the_model_of_shared_memory_bounds_what_the_compiler_took(arch: str) -> None:
    with GOLDEN.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["arch"], row["kernel"]) == (arch, "low_rank_product")
        ]
    assert len(rows) >= 10
    for row in rows:
        form, rank, *_ = row["form"].split("_")
        config = TileConfig(*map(int, re.findall(r"\d+", row["tile"])))
        size = 4 if row["dtype"] == "f32" else 2
        most = model.shared_bytes(config, int(rank[1:]), form == "lora", size)
        assert int(row["shared_bytes"]) <= most + 64, row  # barriers
        assert most <= tiles.table_for(arch).shared_memory, row


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS = {
    "K edge not masked": ("(rk[None, :] < K - k0)", "(rk[None, :] < K)"),
    "rank edge not masked": ("in_r = rr < R", "in_r = rr < RANK"),
    "last K step dropped": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "scale forgotten": ("(t * scale)", "(t * 1.0)"),
    "column tiles of one span skipped": (
        "tl.minimum(span, tiles_n - first_n)",
        "tl.minimum(span, 1)",
    ),
    "t of every span but the first": ("if own == 0:", "if own == 1:"),
    "base of the first columns for all": ("base + col0 * stride_bn", "base + 0 * stride_bn"),
    "gradient of v without the scale": ("gv = product(gt.t(), x)", "gv = product(gt.t() / 2, x)"),
    "base left out of x's gradient": ("gz, u, v, base, None", "gz, u, v, None, None"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(33, 70, 45, 9, torch.float32, "gelu", base=True, scale=0.75)
    module = plant(kernels, tmp_path, *FAULTS[fault], tile_walk)
    monkeypatch.setattr(model, "FILL", 2)  # tiles of rows: a span holds all tiles of columns
    monkeypatch.setattr(kernels, "forward", module.forward)
    monkeypatch.setattr(kernels, "backward", module.backward)
    with pytest.raises(CAUGHT):
        run(case)


def test_a_copy_without_a_fault_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = plant(kernels, tmp_path, "M,", "M,", tile_walk)
    monkeypatch.setattr(kernels, "forward", module.forward)
    monkeypatch.setattr(kernels, "backward", module.backward)
    run(make(37, 70, 45, 9, torch.float32, "gelu", base=True, scale=0.75))


def test_the_raw_ops_of_a_gpu_reach_the_kernel() -> None:
    """What is registered for CUDA, called by itself on the interpreter's tensors."""
    module = sys.modules["bigops.ops.low_rank_linear"]
    case = make([2, 3], 6, 8, 3, torch.float32, "relu", base=True)
    x, u, v, bias, residual, base = case.inputs
    weight = (u, v, base, case.scale)
    args = (x, *weight, bias, residual, case.name)
    with expect("triton.low_rank_linear.f32.fused"):
        y, t, z = module.op._cuda_kept(*args)
        case.check_forward(module.op._cuda(*args))
    case.check_forward(y)
    with expect("triton.low_rank_linear_backward.f32.fused"):
        gx, gu, gv, gbase, gb = module.op.gradients._cuda(
            case.grad, x, *weight, t, z, case.name, *NEEDS
        )
    case.check_gradients([gx, gu, gv, gb, case.grad, gbase])
    double = [i.double() if isinstance(i, Tensor) else i for i in args]
    with backend.record() as names:
        module.op._cuda(*double)
    assert names == ["reference.low_rank_linear"]
