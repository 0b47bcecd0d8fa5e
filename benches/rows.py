"""The rows of a benchmark: one CSV layout, one table, one JSON door."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from bigops.files import replacing

OWN = "bigops"


def is_own(provider: str) -> bool:
    """Whether a provider is ours: `bigops`, or a form of it such as `bigops int8`."""
    return provider == OWN or provider.startswith(f"{OWN} ")


@dataclass(frozen=True)
class Row:
    """One provider on one case. The fields, in this order, are the columns of the CSV.

    ``spread`` is the interquartile range over the median. ``ratio_to_eager`` is eager time over
    this provider's time with its 95% interval; ``ratio_to_best_rival`` is the same against
    ``best_rival``, the fastest of the others, within ``best_low`` to ``best_high``.
    ``isa`` is the instruction set, or the name and architecture of a GPU.
    ``fraction_of_limit`` is None where the machine's limit could not be measured; ``rel_error`` is
    against float64.
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
    best_rival: str
    ratio_to_best_rival: float
    best_low: float
    best_high: float
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


class Compared(Protocol):
    """What a picture needs of a row, of an op or of a whole model."""

    @property
    def op(self) -> str: ...
    @property
    def case_key(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def best_rival(self) -> str: ...
    @property
    def ratio_to_eager(self) -> float: ...
    @property
    def ratio_low(self) -> float: ...
    @property
    def ratio_high(self) -> float: ...


def write_csv(rows: Iterable[Any], path: str | Path) -> None:
    """Write rows of one class as CSV; its fields are the columns.

    What was not measured reads ``unknown``. Without rows the columns are those of `Row`.
    """
    found = list(rows)
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(found[0])] if found else COLUMNS)
        for row in found:
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
                f"  {'provider':<22}{'median us':>11}{'spread':>8}{'vs eager (95%)':>23}"
                f"{'vs rival':>10}{'of limit':>10}{'error':>10}  kernel"
            )
        interval = f"{row.ratio_to_eager:.2f}x ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
        limit = "unknown" if row.fraction_of_limit is None else format(row.fraction_of_limit, ".0%")
        lines.append(
            f"  {row.provider:<22}{row.median_us:>11.1f}{row.spread:>8.0%}{interval:>23}"
            f"{row.ratio_to_best_rival:>9.2f}x{limit:>10}{row.rel_error:>10.1e}  {row.kernel}"
        )
    return "\n".join(lines)
