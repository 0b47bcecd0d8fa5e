"""The summary's marks and counts, and the pictures: one per op."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from bigops.benches import plots, rows, summary
from bigops.benches.rows import Row
from tests.benches.test_harness import ROW


def _own(low: float, high: float, **more: object) -> Row:
    ratio = (low + high) / 2
    return replace(ROW, ratio_to_best_rival=ratio, best_low=low, best_high=high, **more)


@pytest.mark.parametrize(
    ("low", "expected"),
    [
        (0.5, summary.NOT_FIRST),
        (0.8999, summary.NOT_FIRST),
        (0.9, summary.TIE),
        (0.9999, summary.TIE),
        (1.0, summary.FIRST),
        (3.0, summary.FIRST),
    ],
)
def test_the_mark_is_of_the_lower_end_of_the_interval(low: float, expected: str) -> None:
    assert summary.mark(_own(low, low + 5)) == expected


@pytest.mark.parametrize(
    ("provider", "ours"),
    [("bigops", True), ("bigops int8", True), ("bigopsless", False), ("eager", False)],
)
def test_ours_are_named_bigops(provider: str, ours: bool) -> None:
    assert rows.is_own(provider) is ours


def _run() -> list[Row]:
    found = []
    for case, low in (("won", 1.2), ("even", 0.95), ("lost", 0.7), ("lost too", 0.1)):
        own = _own(low, low + 0.1, case=case, best_rival="rival x", median_us=250.0)
        found += [own, replace(own, provider="rival x", median_us=10.0)]
        found.append(replace(own, provider="eager", median_us=700.0))
    second = _own(1.5, 1.6, case="won", provider="bigops sparse", best_rival="rival x")
    return [*found, second]


def test_a_line_per_cell_of_ours_and_a_count() -> None:
    lines = summary.markdown(_run()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    cells = {line.split(" | ")[1] + "/" + line.split(" | ")[7].split()[-1]: line for line in table}
    assert len(table) == 2 + 5
    assert (
        "| rival x | 10.0 | 0.75 (0.70-0.80) | unknown | 1.0e-07 | **not first** |"
        in (cells["lost/bigops"])
    )
    assert "| bigops sparse | 1.5 | rival x | 10.0 | 1.55 (1.50-1.60) |" in cells["won/sparse"]
    assert lines[-1] == "5 cells: 2 first, 1 tie, 2 **not first**."


def test_direction_and_limit_are_shown() -> None:
    row = _own(1.0, 1.1, direction="forward+backward", fraction_of_limit=0.73)
    assert "| a=1 forward+backward | bigops |" in summary.markdown([row])
    assert "| 73% |" in summary.markdown([row])


def test_nothing_measured_is_an_empty_table() -> None:
    assert summary.markdown([]).endswith("0 cells: 0 first, 0 tie, 0 **not first**.")


def test_the_file_says_what_its_marks_mean_and_what_ran(tmp_path: Path) -> None:
    summary.write(_run(), tmp_path / "s.md")
    text = (tmp_path / "s.md").read_text()
    assert "95% interval is below 0.90" in text
    assert summary.markdown(_run()) in text
    assert text.endswith("bigops=0, avx2, 2 threads\n")
    assert [f.name for f in tmp_path.iterdir()] == ["s.md"]


def _size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_one_picture_per_op_at_a_size_that_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    many = [replace(row, case=f"{row.case} {n}") for row in _run() for n in range(10)]
    many += [replace(row, op="other_op") for row in _run()]
    written = plots.plot(many, tmp_path / "b.png")
    assert [file.name for file in written] == ["b-an_op.png", "b-other_op.png"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b-an_op.png", "b-other_op.png"]
    for file in written:
        width, height = _size(file)
        assert width == 1100
        assert 200 < height < 2500
    assert _size(written[0])[1] > _size(written[1])[1]
