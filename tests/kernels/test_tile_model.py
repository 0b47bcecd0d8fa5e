"""The model that picks a dense tile: what always holds, and shapes of which the answer is known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from bigops.kernels.common import tile_model, tiles
from bigops.kernels.common.tiles import TileConfig
from tests.kernels.gpu_report.jobs import launched

ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
GOLDEN = Path(__file__).parents[1] / "golden" / "gpu_report.csv"
sizes = st.integers(0, 2**31 - 2**12)


@given(
    arch=st.sampled_from(ARCHS),
    dtype=st.sampled_from(list(tiles.DTYPES)),
    m=sizes,
    n=sizes,
    k=sizes,
    gated=st.booleans(),
    aligned=st.booleans(),
    described=st.booleans(),
)
@settings(deadline=None)
def test_every_shape_gets_one_of_the_candidates(
    arch: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    gated: bool,
    aligned: bool,
    described: bool,
) -> None:
    chosen = tiles.choose_config(arch, dtype, m, n, k, gated, aligned, described)
    entries = [e for e in tiles.table_for(arch).entries if e.config == chosen]
    form = "gated" if gated else "plain"
    assert any(
        (e.form, e.aligned) == (form, aligned) and tiles.DTYPES[dtype] in e.dtypes for e in entries
    )
    assert not chosen.persistent or (
        aligned and described and arch in ("sm_90", "sm_100", "sm_120")
    )
    up = tile_model.rounded(m, n, k)
    assert tile_model.bucket(m, n, k) == tile_model.bucket(*up)
    assert chosen == tiles.choose_config(arch, dtype, *up, gated, aligned, described)


@given(m=sizes, n=sizes, k=sizes)
def test_a_bucket_holds_its_shapes(m: int, n: int, k: int) -> None:
    for size, up in zip((m, n, k), tile_model.rounded(m, n, k), strict=True):
        assert up & (up - 1) == 0
        assert 16 <= up <= 65536
        assert size <= up or up == 65536
        assert up // 2 < size or up == 16


def test_names_of_buckets() -> None:
    assert tile_model.bucket(60, 4000, 4096) == "m64-n4096-k4096"
    assert tile_model.bucket(0, 1, 17) == "m16-n16-k32"
    assert tile_model.bucket(2**31, 65537, 65536) == "m65536-n65536-k65536"


def _fits(row: dict[str, str], table: tiles.Table, entry: tiles.Entry) -> bool:
    kernel = "gemm_persistent" if entry.config.persistent else "gemm"
    wide = row["form"].partition("_")[2] in ("", "rows", "even", "wide")
    return (
        row["arch"] in table.serves
        and row["kernel"] == kernel
        and row["dtype"] in entry.dtypes
        and row["tile"] == str(launched(entry.config))
        and row["form"].startswith("gated") == (entry.form == "gated")
        and wide == entry.aligned
    )


def test_candidates_are_those_of_the_report() -> None:
    """Each was compiled for each device that it serves; its programs are the least of these."""
    with GOLDEN.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, table in tiles.tables().items():
        if name == "interpreter":
            continue
        for entry in table.entries:
            found = [row for row in rows if _fits(row, table, entry)]
            compiled = {(row["arch"], row["dtype"]) for row in found}
            reported = {arch for arch in table.serves if arch in ARCHS}
            assert compiled == {(arch, dtype) for arch in reported for dtype in entry.dtypes}, entry
            assert {row["verdict"] for row in found} == {"ok"}
            assert max(int(row["shared_bytes"]) for row in found) <= table.shared_memory
            assert min(int(row["programs_per_sm"]) for row in found) == entry.config.programs, entry


SMALL, TALL, LARGE = (
    TileConfig(64, 64, 32, 8, 4, 3, 1, programs=2),
    TileConfig(128, 64, 32, 8, 4, 3, 1, programs=2),
    TileConfig(128, 128, 32, 8, 4, 3, 1, programs=2),
)
DEVICE = tile_model.Device(100, 1024, 128)


def _best(m: int, n: int, k: int, *candidates: TileConfig) -> TileConfig:
    return tile_model.best(candidates, DEVICE, "bf16", m, n, k, False)


def wave_efficiency(config: TileConfig, multiprocessors: int, m: int, n: int) -> float:
    """Elements of c over those that the turns of all multiprocessors have room for; 0 to 1."""
    count = -(-m // config.block_m) * -(-n // config.block_n)
    turns = -(-count // multiprocessors)
    return m * n / (turns * multiprocessors * config.block_m * config.block_n)


def test_waves_by_hand() -> None:
    """132 tiles of 132 multiprocessors are one full turn; one more tile leaves half of two idle."""
    tile = TileConfig(128, 128, 32, 8, 4, 3, 1)
    assert wave_efficiency(tile, 132, 12 * 128, 11 * 128) == 1.0
    assert wave_efficiency(tile, 132, 133 * 128, 128) == pytest.approx(133 / 264)
    assert wave_efficiency(tile, 132, 1, 1) == pytest.approx(1 / (132 * 128 * 128))


def test_the_better_filled_wave_wins() -> None:
    # 100 large tiles are a turn of 100 multiprocessors; 102 of them are two, 204 of half the size
    # are three halves.
    full, over = (10 * 128, 10 * 128, 4096), (17 * 128, 6 * 128, 4096)
    assert _best(*full, TALL, LARGE) == LARGE
    assert _best(*over, TALL, LARGE) == TALL
    assert wave_efficiency(TALL, 100, *over[:2]) > wave_efficiency(LARGE, 100, *over[:2])
    assert _best(512, 640, 4096, SMALL, LARGE) == SMALL  # 20 large tiles leave 80 idle


def test_large_tiles_win_where_there_are_many() -> None:
    assert _best(65536, 65536, 4096, SMALL, TALL, LARGE) == LARGE
    assert _best(16, 65536, 4096, SMALL, TALL, LARGE) == SMALL  # rows past 16 would be for nothing


def test_occupancy_hides_waits() -> None:
    alone = LARGE._replace(programs=1)
    assert _best(65536, 4096, 64, alone, LARGE) == LARGE
    assert _best(64, 64, 4096, alone, LARGE) == alone  # a single tile: a tie, the first of them
    shallow = LARGE._replace(num_stages=2, programs=1, block_k=16)
    assert _best(64, 64, 4096, shallow, alone) == alone


def test_the_persistent_form_wins_by_its_later_tiles() -> None:
    persistent = LARGE._replace(persistent=True)
    assert _best(65536, 4096, 512, LARGE, persistent) == persistent
    assert _best(1280, 1280, 512, persistent, LARGE) == LARGE  # one turn: descriptors for nothing


def test_the_time_does_not_fall_with_the_shape() -> None:
    for arch in ARCHS:
        table = tiles.table_for(arch)
        device = tiles.device_figures(arch)
        for entry in table.entries:
            gated = entry.form == "gated"

            def time(m: int, n: int, k: int) -> float:
                return tile_model.clocks(entry.config, device, entry.dtypes[0], m, n, k, gated)  # noqa: B023

            for m, n, k in ((16, 1024, 64), (512, 512, 512), (4096, 4096, 64)):
                here = time(m, n, k)
                assert 0 < here <= min(time(2 * m, n, k), time(m, 2 * n, k)) < float("inf")
                assert here < time(m, n, 4 * k)


def test_the_choice_of_known_shapes() -> None:
    def chosen(arch: str, m: int, n: int, k: int) -> TileConfig:
        return tiles.choose_config(arch, torch.bfloat16, m, n, k)

    for arch in ARCHS:
        assert chosen(arch, 1, 4096, 4096).block_m == 32
        assert chosen(arch, 8192, 8192, 8192).block_m >= 128
    for arch in ("sm_90", "sm_100", "sm_120"):
        assert chosen(arch, 8192, 8192, 8192).persistent
        assert not chosen(arch, 16, 4096, 4096).persistent
    # 1024 x 1024 on 132 multiprocessors: 32 tiles of 128 x 256 leave 100 of them idle
    tile = chosen("sm_90", 1024, 1024, 1024)
    assert (tile.block_m, tile.block_n) == (64, 128)
    assert wave_efficiency(tile, 132, 1024, 1024) > 0.9
