"""The tile configs of quantized_linear as data: the rule that picks one, what a bad file gives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bigops.kernels.common import tiles
from bigops.kernels.quantized_linear import forward as quantized_linear
from bigops.kernels.quantized_linear import tiles as quantized_tiles

SM_90 = quantized_tiles.CONFIG_DIR / "sm_90.json"


def test_every_device_has_a_file_of_its_name() -> None:
    names = {path.stem for path in quantized_tiles.CONFIG_DIR.glob("*.json")}
    assert names == set(tiles.tables())
    for name in names:
        assert (
            quantized_tiles.read_table(quantized_tiles.CONFIG_DIR / f"{name}.json").device == name
        )


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120", "gfx90a", "interpreter"])
def test_every_product_finds_a_tile(arch: str) -> None:
    kinds = quantized_tiles.KINDS
    for kind, dtype, aligned in itertools.product(kinds, tiles.DTYPES, (True, False)):
        small = quantized_tiles.choose_config(arch, kind, dtype, 1, aligned)
        large = quantized_tiles.choose_config(arch, kind, dtype, 10**6, aligned)
        assert small.block_m <= large.block_m
        assert large.block_k <= 128
    assert quantized_tiles.row_config(arch).block_n >= 16


def test_unserved_dtype_device_and_absent_gpu() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected one of .*; got torch.float64"):
        quantized_tiles.choose_config("sm_90", "w8", torch.float64, 1)
    with pytest.raises(ValueError, match="arch: expected sm_80 or later"):
        quantized_tiles.choose_config("sm_75", "w8", torch.float16, 1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU here"):
            quantized_linear.explain("cuda", torch.float16, 1, 1, 1, 8, 0, "dynamic")


def _with(path: tuple[Any, ...], value: Any) -> str:
    data = json.loads(SM_90.read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


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
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="sm_90.json: ") as caught:
        quantized_tiles.read_table(path)
    assert message in str(caught.value)
