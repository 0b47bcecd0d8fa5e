"""The rows of a benchmark: one CSV layout, one table, one plot, one JSON door."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bigops.files import replacing


@dataclass(frozen=True)
class Row:
    """One provider on one case. The fields, in this order, are the columns of the CSV.

    ``spread`` is the interquartile range over the median; ``ratio_to_eager`` is eager time over
    this provider's time with its 95% interval; ``fraction_of_limit`` is None where the machine's
    limit could not be measured; ``rel_error`` is against float64.
    """

    op: str
    case: str
    direction: str
    dtype: str
    m: int
    k: int
    n: int
    params: str
    provider: str
    kernel: str
    isa: str
    threads: int
    median_us: float
    spread: float
    ratio_to_eager: float
    ratio_low: float
    ratio_high: float
    ratio_to_best_rival: float
    fraction_of_limit: float | None
    rel_error: float
    versions: str

    @property
    def case_key(self) -> str:
        """What rows of the same case share, and no others."""
        shape = f"{self.m}x{self.k}x{self.n}"
        return f"{self.op} {self.case} {shape}\n{self.dtype} {self.direction} {self.params}"


COLUMNS = [f.name for f in fields(Row)]


def _cell(value: Any) -> Any:
    if value is None:
        return "unknown"
    return f"{value:.6g}" if isinstance(value, float) else value


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """Write the rows as CSV with a header line; an unmeasured limit reads ``unknown``."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(value) for value in asdict(row).values()])


def from_benchmark_json(path: str | Path) -> list[Row]:
    """Read the rows that the ``versus`` fixture left in a pytest-benchmark JSON file.

    Raises:
        ValueError: the file is no such JSON, or holds no rows.
    """
    try:
        benchmarks = json.loads(Path(path).read_text())["benchmarks"]
        rows = [Row(**row) for bench in benchmarks for row in bench["extra_info"].get("rows", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected JSON of `pytest benches --benchmark-json`, got {error!r}"
        ) from error
    if not rows:
        raise ValueError(f"{path}: expected rows of the versus fixture, found none")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal, grouped by case."""
    lines: list[str] = []
    head = ""
    for row in rows:
        if row.case_key != head:
            head = row.case_key
            lines.append("\n" + head.replace("\n", " ") + f" ({row.threads} threads)")
            lines.append(
                f"  {'provider':<16}{'median us':>11}{'spread':>8}{'vs eager (95%)':>23}"
                f"{'vs rival':>10}{'of limit':>10}{'error':>10}  kernel"
            )
        interval = f"{row.ratio_to_eager:.2f}x ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
        limit = "unknown" if row.fraction_of_limit is None else format(row.fraction_of_limit, ".0%")
        lines.append(
            f"  {row.provider:<16}{row.median_us:>11.1f}{row.spread:>8.0%}{interval:>23}"
            f"{row.ratio_to_best_rival:>9.2f}x{limit:>10}{row.rel_error:>10.1e}  {row.kernel}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Speed-up over eager per case and provider, with 95% intervals, as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot: needs matplotlib (pip install 'bigops[plot]')") from None
    cases = list(dict.fromkeys(r.case_key for r in rows))
    providers = list(dict.fromkeys(r.provider for r in rows if r.provider != "eager"))
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(cases) * max(1, len(providers))))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(providers))
    for place, provider in enumerate(providers):
        mine = [r for r in rows if r.provider == provider]
        where = [cases.index(r.case_key) + (place + 0.5) * height - 0.4 for r in mine]
        ratios = [r.ratio_to_eager for r in mine]
        below = [max(0.0, r.ratio_to_eager - r.ratio_low) for r in mine]
        above = [max(0.0, r.ratio_high - r.ratio_to_eager) for r in mine]
        axes.barh(
            where, ratios, height * 0.9, xerr=[below, above], label=provider, error_kw={"lw": 1}
        )
    axes.axvline(1.0, color="black", lw=1)
    axes.set_yticks(range(len(cases)), cases, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over eager PyTorch (median of interleaved pairs, 95% interval)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
