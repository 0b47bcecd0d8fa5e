"""The tile configs as data: the rule that picks one, and what a bad file gives."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bigops.kernels import fused_linear
from bigops.kernels.common import launch, tiles
from tests.kernels.tile_files import changed, check_refusal

SM_90 = tiles.CONFIG_DIR / "sm_90.json"


@pytest.mark.parametrize(
    ("arch", "device"),
    [
        ("sm_80", "sm_80"),
        ("sm_87", "sm_80"),
        ("sm_89", "sm_86"),
        ("sm_90a", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_120"),
        ("sm_121", "sm_120"),
        ("sm_130", "sm_86"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_every_device_finds_its_file(arch: str, device: str) -> None:
    assert tiles.table_for(arch).device == device
    for dtype in tiles.DTYPES:
        for gated in (False, True):
            for aligned in (False, True):
                assert tiles.choose_config(arch, dtype, 9, 9, 9, gated, aligned).block_m >= 16


def test_shipped_files_are_named_after_their_device_and_serve_it() -> None:
    for path in tiles.CONFIG_DIR.glob("*.json"):
        table = tiles.read_table(path)
        assert table.device == path.stem
        assert table.device in table.serves
    served = [arch for table in tiles.tables().values() for arch in table.serves]
    assert len(served) == len(set(served))


@pytest.mark.parametrize("arch", ["sm_75", "sm_", "cpu", "h100"])
def test_unserved_device(arch: str) -> None:
    with pytest.raises(ValueError, match=f"arch: expected sm_80 or later.*got '{arch}'"):
        tiles.choose_config(arch, torch.float16, 1, 1, 1)


def test_unserved_dtype() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected one of .*; got torch.float64"):
        tiles.choose_config("sm_90", torch.float64, 1, 1, 1)


_with = functools.partial(changed, SM_90)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a readable JSON file"),
        (SM_90.read_text()[:400], "expected a readable JSON file"),
        ("[]", "format: expected 'bigops-tiles-2'; got 'list'"),
        ('{"BLOCK_SIZE_M": 64}', "format: expected 'bigops-tiles-2'; got None"),
        (_with(("extra",), 1), "top level: expected the fields format"),
        (_with(("gemm", 0, "tile"), [64, 96, 32]), "tile: expected three powers of two"),
        (_with(("gemm", 0, "tile"), [True, 64, 64]), "tile: expected three powers of two"),
        (_with(("gemm", 1, "num_warps"), 3), "num_warps: expected a power of two up to 32; got 3"),
        (_with(("gemm", 1, "num_stages"), 0), "num_stages: expected 1 to 64; got 0"),
        (_with(("gemm", 1, "parts"), 64), "parts: expected a power of two"),
        (_with(("gemm", 1, "max_m"), 9), "gemm[1]: expected the fields form, aligned"),
        (_with(("gemm", 1, "programs"), 0), "programs: expected 1 to 64; got 0"),
        (_with(("gemm", 1, "persistent"), 1), "persistent: expected true or false"),
        (_with(("gemm", 3, "aligned"), False), "persistent: expected true or false, true only"),
        (_with(("gemm", 1, "form"), "dual"), "form: expected one of"),
        (_with(("gemm", 1, "aligned"), 1), "aligned: expected true or false; got 1"),
        (_with(("gemm", 1, "dtypes"), ["fp64"]), "dtypes: expected some of"),
        (_with(("gemm",), []), "plain aligned f32: expected a tile that is not persistent"),
        (_with(("pointwise", "block_m"), 12), "pointwise: expected powers of two"),
        (_with(("shared_memory",), "228K"), "shared_memory: expected bytes"),
        (_with(("serves",), ["sm_90"]), "serves: expected figures by device name"),
        (_with(("serves", "sm_90"), 132), "serves: sm_90: expected the fields multiprocessors"),
        (
            _with(("serves", "sm_90", "multiprocessors"), 0),
            "serves: sm_90: expected positive integers",
        ),
    ],
)
def test_bad_file_gives_an_error_that_names_the_place(
    text: str, message: str, tmp_path: Path
) -> None:
    check_refusal(tmp_path, tiles.read_table, text, message)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.json: expected a readable JSON file"):
        tiles.read_table(tmp_path / "absent.json")


def test_explain_names_the_config_of_a_device_that_is_not_here() -> None:
    config, reason = fused_linear.explain("sm_90", torch.bfloat16, 512, 8192, 1024, 8)
    expected = tiles.choose_config("sm_90", torch.bfloat16, 512, 4096, 1024, gated=True)
    assert config == {**expected._asdict(), "file": "sm_90.json"}
    assert reason == (
        "pointer form, aligned gated bf16 tile for m512-n4096-k1024 from kernels/configs/sm_90.json"
    )
    config, reason = fused_linear.explain("sm_90", torch.bfloat16, 4096, 4096, 4096, 0)
    assert config["persistent"]
    assert reason.startswith(
        "persistent form by TMA, aligned plain bf16 tile for m4096-n4096-k4096"
    )
    config, _ = fused_linear.explain("sm_90", torch.bfloat16, 512, 8192, 1024, 8)
    odd, reason = fused_linear.explain("sm_90", torch.bfloat16, 512, 10, 1024, 0)
    assert odd["block_n"] < config["block_n"]
    assert reason.startswith("pointer form, unaligned plain")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU here"):
            fused_linear.explain("cuda", torch.bfloat16, 1, 1, 1, 0)


def test_tf32_only_where_torch_allows_it() -> None:
    before = torch.get_float32_matmul_precision()
    assert launch.dot_precision(torch.float32) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.dot_precision(torch.float32) == "tf32"
        assert launch.dot_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert launch.dot_precision(torch.float32) == "ieee"
