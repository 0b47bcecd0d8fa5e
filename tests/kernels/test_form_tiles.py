"""Tile configs by form as data: the rule that picks one, what a bad file gives."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bigops.kernels.common import form_tiles, tiles
from bigops.kernels.low_rank_linear import model as low_rank_model
from tests.kernels.tile_files import changed, check_refusal

SM_90 = tiles.CONFIG_DIR / "low_rank_linear" / "sm_90.json"
OPS = tuple(form_tiles.FORMS)


@pytest.mark.parametrize("op", OPS)
def test_every_device_has_a_file_of_its_name(op: str) -> None:
    names = {path.stem for path in (tiles.CONFIG_DIR / op).glob("*.json")}
    assert names == set(tiles.tables())
    for name in names:
        table = form_tiles.read_table(tiles.CONFIG_DIR / op / f"{name}.json", op)
        assert table.device == name
        assert table.shared_memory == tiles.tables()[name].shared_memory


ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "gfx942", "gfx90a", "gfx950"]


@pytest.mark.parametrize("arch", [*ARCHS, "interpreter"])
def test_every_block_sparse_product_finds_a_tile(arch: str) -> None:
    forms = form_tiles.FORMS["sparse_linear"]
    for form, dtype, aligned, m in itertools.product(forms, tiles.DTYPES, (True, False), (1, 999)):
        chosen = form_tiles.choose_config("sparse_linear", arch, form, dtype, m, 32, aligned)
        assert chosen is not None
        assert chosen == form_tiles.choose_config(
            "sparse_linear", arch, form, dtype, m, 16, aligned
        )
        assert chosen.block_k >= 32 or form == "sampled"  # one block at least


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_low_rank_tile_fits_and_is_reached(arch: str) -> None:
    table = form_tiles.table_for("low_rank_linear", arch)
    reached = set()
    for entry in table.entries:
        m = entry.max_m or 10**6
        based = entry.form == "lora"
        for dtype in (d for d, name in tiles.DTYPES.items() if name in entry.dtypes):
            config = low_rank_model.fits(arch, dtype, m, entry.width, based, entry.aligned)
            assert config == entry.config, entry
            reached.add(entry)
            assert low_rank_model.fits(arch, dtype, m, 2048, based, entry.aligned) is None
    assert reached == set(table.entries)
    half = low_rank_model.fits(arch, torch.bfloat16, 4096, 64, True, True)
    assert half is not None  # a LoRA of the usual ranks stays on chip everywhere


def test_the_narrowest_then_the_shortest_that_reaches_serves() -> None:
    def chosen(m: int, width: int) -> Any:
        return form_tiles.choose_config(
            "low_rank_linear", "sm_90", "factors", torch.bfloat16, m, width
        )

    assert chosen(8, 16) == chosen(32, 64)
    assert chosen(33, 16) == chosen(10**6, 64)
    assert chosen(8, 16).block_m < chosen(33, 16).block_m
    assert chosen(33, 128) == chosen(33, 256) != chosen(33, 64)
    assert chosen(33, 512) is None


def test_unserved_dtype_and_device() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected one of .*; got torch.float64"):
        form_tiles.choose_config("sparse_linear", "sm_90", "forward", torch.float64, 1, 16)
    with pytest.raises(ValueError, match="arch: expected sm_80 or later"):
        form_tiles.choose_config("sparse_linear", "sm_75", "forward", torch.float16, 1, 16)


_with = functools.partial(changed, SM_90)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a readable JSON file"),
        ("[]", "format: expected 'bigops-form-tiles-1'; got 'list'"),
        (_with(("extra",), 1), "top level: expected the fields format"),
        (_with(("device",), "sm_70"), "device: expected one of"),
        (_with(("tiles",), {}), "tiles: expected a list; got dict"),
        (_with(("tiles",), []), "tiles: expected entries of the form factors; got none"),
        (_with(("tiles", 0, "form"), "gated"), "tiles[0]: form: expected one of factors, lora"),
        (_with(("tiles", 0, "dtypes"), []), "tiles[0]: dtypes: expected some of"),
        (_with(("tiles", 0, "dtypes"), ["f8"]), "tiles[0]: dtypes: expected some of"),
        (_with(("tiles", 0, "aligned"), 1), "aligned: expected true or false; got 1"),
        (_with(("tiles", 0, "tile"), [64, 96, 32]), "tile: expected three powers of two"),
        (_with(("tiles", 0, "tile"), [64, 64]), "tile: expected three powers of two"),
        (_with(("tiles", 0, "width"), 8), "width: expected a power of two from 16 on; got 8"),
        (_with(("tiles", 0, "max_m"), 0), "max_m: expected a positive integer or null; got 0"),
        (_with(("tiles", 1, "num_stages"), 0), "num_stages: expected 1 to 8; got 0"),
        (_with(("tiles", 1, "num_warps"), 6), "num_warps: expected a power of two up to 32"),
        (_with(("tiles", 1, "parts"), 3), "parts: expected a power of two up to 16"),
        (_with(("tiles", 1, "group_m"), 0), "group_m: expected 1 to 64; got 0"),
    ],
)
def test_bad_file_gives_an_error_that_names_the_place(
    text: str, message: str, tmp_path: Path
) -> None:
    check_refusal(
        tmp_path, functools.partial(form_tiles.read_table, op="low_rank_linear"), text, message
    )
