"""Where we stand against the best rival, cell by cell: the table that a run ends with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bigops.benches.rows import Row, is_own
from bigops.files import replacing

SLOWER = 0.90  # "not slower than": the lower end of the interval is at least this
FIRST, TIE, NOT_FIRST = "first", "tie", "**not first**"
_HEAD = (
    "op",
    "case",
    "M",
    "K",
    "N",
    "dtype",
    "params",
    "ours",
    "us",
    "best rival",
    "us",
    "rival / ours (95%)",
    "of limit",
    "error",
    "",
)


def mark(row: Row) -> str:
    """``first``, ``tie`` or ``**not first**`` by the lower end of the best rival's time / ours."""
    if row.best_low < SLOWER:
        return NOT_FIRST
    return TIE if row.best_low < 1.0 else FIRST


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per cell and provider of ours, and a count below it."""
    times = {(row.case_key, row.provider): row.median_us for row in rows}
    own = [row for row in rows if is_own(row.provider)]
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    lines += [_line(_cells(row, times.get((row.case_key, row.best_rival)))) for row in own]
    marks = [mark(row) for row in own]
    counts = ", ".join(f"{marks.count(kind)} {kind}" for kind in (FIRST, TIE, NOT_FIRST))
    return "\n".join([*lines, "", f"{len(own)} cells: {counts}."])


def write(rows: Sequence[Row], path: str | Path) -> None:
    """Write the summary as a file of its own, with what its marks mean and what ran."""
    ran = sorted({f"{row.versions}, {row.isa}, {row.threads} threads" for row in rows})
    text = (
        "# Against the best rival\n\n"
        "Medians of interleaved rounds. `rival / ours` above 1: we are the faster one. "
        f"{NOT_FIRST}: the lower end of its 95% interval is below {SLOWER:.2f}; {TIE}: it is "
        f"below 1. Errors are against float64.\n\n{markdown(rows)}\n\n" + "\n".join(ran) + "\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(text)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, best_us: float | None) -> list[str]:
    way = "" if row.direction == "forward" else f" {row.direction}"
    ratio = f"{row.ratio_to_best_rival:.2f} ({row.best_low:.2f}-{row.best_high:.2f})"
    limit = "unknown" if row.fraction_of_limit is None else format(row.fraction_of_limit, ".0%")
    best = "unknown" if best_us is None else _microseconds(best_us)
    return [
        row.op,
        row.case,
        str(row.m),
        str(row.k),
        str(row.n),
        row.dtype,
        row.params + way,
        row.provider,
        _microseconds(row.median_us),
        row.best_rival,
        best,
        ratio,
        limit,
        f"{row.rel_error:.1e}",
        mark(row),
    ]


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
