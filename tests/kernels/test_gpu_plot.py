"""The picture of the GPU report: what it shows comes from the table, and it is that of today."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.gpu_report import golden as gpu_golden
from tests.kernels.gpu_report import plot as gpu_plot
from tests.kernels.gpu_report.devices import ARCHS, most_shared, occupancy


def _row(**changed: object) -> dict[str, object]:
    row = {"arch": "sm_90", "kernel": "gemm", "registers": 100, "shared_bytes": 58112, "warps": 8}
    return row | {"programs_per_sm": 2, "limiter": "registers"} | changed


def test_what_is_shown_of_a_kernel_on_a_device() -> None:
    rows = [
        _row(),
        _row(registers=200, programs_per_sm=1),
        _row(shared_bytes=232448, programs_per_sm=1, limiter="shared"),
        _row(arch="gfx950", shared_bytes=81920, programs_per_sm=4),
    ]
    shown = gpu_plot.cells(rows)
    # 8, 8 and 16 of 64 warps; of 32 waves all
    assert shown["gemm", "sm_90"] == gpu_plot.Cell(3, 200, 100, 12, "registers")
    assert shown["gemm", "gfx950"] == gpu_plot.Cell(1, 100, 50, 100, "registers")
    tied = gpu_plot.cells([_row(limiter="shared"), _row(limiter="programs")])
    assert tied["gemm", "sm_90"].limiter == "programs"


def test_the_digest_moves_with_what_is_shown_alone() -> None:
    rows = [_row(), _row(registers=200)]
    same = gpu_plot.digest(rows)
    assert gpu_plot.digest([_row(registers=200), _row()]) == same
    assert gpu_plot.digest([_row(tma=7), _row(registers=200)]) == same
    assert gpu_plot.digest([_row(), _row(registers=201)]) != same
    assert gpu_plot.digest([*rows, _row(arch="sm_80")]) != same


def test_every_kernel_is_shown_on_every_device() -> None:
    shown = gpu_plot.cells(gpu_golden.read())
    kernels = {kernel for kernel, _ in shown}
    assert len(kernels) >= 10
    without_tma = set(ARCHS) - {"sm_90", "sm_100", "sm_120"}
    absent = {("gemm_persistent", arch) for arch in without_tma}
    assert set(shown) == {(kernel, arch) for kernel in kernels for arch in ARCHS} - absent
    for (_, arch), cell in shown.items():
        assert 0 < cell.occupancy <= 100
        assert cell.shared <= 100, arch
        assert cell.limiter in gpu_plot.LETTERS


def test_the_committed_picture_is_of_the_committed_table() -> None:
    """Where it is not: `make gpu-report ARGS=--plot`."""
    image = pytest.importorskip("PIL.Image")
    with image.open(gpu_plot.PICTURE) as picture:
        assert picture.text["Source"] == gpu_plot.digest(gpu_golden.read())
    assert gpu_plot.PICTURE.stat().st_size < 200_000


def test_drawing_writes_the_same_file_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [_row(), _row(arch="sm_80", kernel="adamw_step"), _row(arch="gfx950")]
    pictures = []
    for name in ("first.png", "second.png"):
        gpu_plot.draw(rows, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert gpu_plot.digest(rows).encode() in pictures[0]


def test_occupancy_by_hand() -> None:
    """CUDA C++ Programming Guide: 65536 registers of a multiprocessor, given in fours of warps."""
    assert occupancy("sm_90", 128, 1000, 8) == (2, "registers")
    assert occupancy("sm_90", 129, 1000, 8) == (1, "registers")  # 136 a thread are allocated
    assert occupancy("sm_90", 32, 114688, 4) == (2, "shared")  # 1024 of each are reserved
    assert occupancy("sm_86", 16, 0, 1) == (16, "programs")
    assert occupancy("sm_89", 16, 0, 1) == (24, "programs")
    assert occupancy("sm_120", 16, 0, 16) == (3, "warps")
    assert occupancy("gfx942", 128, 30000, 8) == (2, "registers")
    assert occupancy("gfx950", 64, 60000, 4) == (2, "shared")
    assert most_shared("sm_120") == 101376
