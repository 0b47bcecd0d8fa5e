"""Tile configs of quantized_linear and fp8_linear: the rule that picks, what a bad file gives."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from bigops.kernels.common import tiles
from bigops.kernels.fp8_linear import forward as fp8_linear
from bigops.kernels.fp8_linear import tiles as fp8_tiles
from bigops.kernels.quantized_linear import forward as quantized_linear
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from tests.kernels.tile_files import changed, check_refusal

SM_90 = quantized_tiles.CONFIG_DIR / "sm_90.json"
OPS = (quantized_tiles, fp8_tiles)


@pytest.mark.parametrize("of", OPS)
def test_every_device_has_a_file_of_its_name(of: ModuleType) -> None:
    names = {path.stem for path in of.CONFIG_DIR.glob("*.json")}
    assert names == set(tiles.tables())
    for name in names:
        assert of.read_table(of.CONFIG_DIR / f"{name}.json").device == name


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120", "gfx90a", "interpreter"])
@pytest.mark.parametrize("of", OPS)
def test_every_product_finds_a_tile(of: ModuleType, arch: str) -> None:
    for kind, dtype, aligned in itertools.product(of.KINDS, tiles.DTYPES, (True, False)):
        small = of.choose_config(arch, kind, dtype, 1, aligned)
        large = of.choose_config(arch, kind, dtype, 10**6, aligned)
        assert small.block_m <= large.block_m
        assert large.block_k <= 128
    assert of.row_config(arch).block_n >= 16


@pytest.mark.parametrize("of", OPS)
def test_unserved_dtype_and_device(of: ModuleType) -> None:
    kind, *_ = of.KINDS
    with pytest.raises(TypeError, match=r"dtype: expected one of .*; got torch.float64"):
        of.choose_config("sm_90", kind, torch.float64, 1)
    with pytest.raises(ValueError, match="arch: expected sm_80 or later"):
        of.choose_config("sm_75", kind, torch.float16, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_absent_gpu() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        quantized_linear.explain("cuda", torch.float16, 1, 1, 1, 8, 0, "dynamic")
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        fp8_linear.explain("cuda", torch.float16, 1, 1, 1, "none")


_with = functools.partial(changed, SM_90)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a readable JSON file"),
        ("[]", "format: expected 'bigops-quantized-tiles-1'; got 'list'"),
        (_with(("extra",), 1), "top level: expected the fields format"),
        (_with(("gemm",), {}), "gemm: expected a list; got dict"),
        (_with(("gemm",), []), "w8a8 aligned f32: expected different max_m, one of them null"),
        (_with(("gemm", 0, "kinds"), ["w2"]), "gemm[0]: kinds: expected some of"),
        (_with(("gemm", 0, "dtypes"), []), "gemm[0]: dtypes: expected some of"),
        (_with(("gemm", 0, "aligned"), 1), "aligned: expected true or false; got 1"),
        (_with(("gemm", 0, "tile"), [64, 96, 32]), "tile: expected three powers of two"),
        (_with(("gemm", 0, "tile"), [64, 64, 256]), "tile: expected three powers of two"),
        (_with(("gemm", 0, "tile"), [64, 64, 16]), "tile: expected three powers of two"),
        (_with(("gemm", 0, "max_m"), 0), "max_m: expected a positive integer or null; got 0"),
        (_with(("gemm", 1, "num_stages"), 0), "num_stages: expected 1 to 64; got 0"),
        (_with(("gemm", 1, "num_warps"), 64), "num_warps: expected a power of two up to 32"),
        (_with(("gemm", 1, "parts"), 64), "parts: expected a power of two up to"),
        (_with(("gemm", 0, "max_m"), None), "expected different max_m, one of them null"),
        (_with(("rows", "block_m"), 3), "rows: expected powers of two"),
        (_with(("rows",), {}), "rows: expected the fields"),
    ],
)
def test_bad_file_gives_an_error_that_names_the_place(
    text: str, message: str, tmp_path: Path
) -> None:
    check_refusal(tmp_path, quantized_tiles.read_table, text, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[128, 128, 128]", "[128, 256, 128]", "expected at most 128 columns of y"),
        ('"f8a8"', '"w8a8"', "kinds: expected some of"),
        ("bigops-fp8-tiles-1", "bigops-quantized-tiles-1", "format: expected 'bigops-fp8-tiles-1'"),
    ],
)
def test_bad_file_of_fp8(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (fp8_tiles.CONFIG_DIR / "sm_90.json").read_text()
    assert old in text
    check_refusal(tmp_path, fp8_tiles.read_table, text.replace(old, new), message)
