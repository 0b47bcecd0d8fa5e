"""From which sparsity a pattern beats the dense product of its dtype, from a bench's CSV.

bigops bench --op sparse_linear --match pattern --csv patterns.csv
python -m bigops.benches.crossover patterns.csv
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Cell = tuple[str, str, int]  # values, pattern, rows of x
SPARSE_RIVALS = ("torch csr",)  # no dense products


def ratios(rows: Iterable[Mapping[str, str]]) -> dict[Cell, dict[float, float]]:
    """Best dense time / our time by cell and sparsity.

    Args:
        rows: rows of the CSV, as `csv.DictReader` gives them.

    Raises:
        ValueError: a row without the columns or parameters of `sparse_linear`.
    """
    times: dict[tuple[Cell, float], dict[str, float]] = defaultdict(dict)
    try:
        for row in rows:
            params = dict(part.split("=", 1) for part in row["params"].split())
            cell = (params["values"], params["pattern"], int(row["m"]))
            times[cell, float(params["sparsity"])][row["provider"]] = float(row["median_us"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"rows: expected the CSV of sparse_linear cases; got {error!r}") from None
    found: dict[Cell, dict[float, float]] = defaultdict(dict)
    for (cell, sparsity), by in times.items():
        dense = [t for name, t in by.items() if name != "bigops" and name not in SPARSE_RIVALS]
        if "bigops" in by and dense:
            found[cell][sparsity] = min(dense) / by["bigops"]
    return found


def table(found: Mapping[Cell, Mapping[float, float]]) -> str:
    """Markdown: one line a format and pattern, for each M the lowest sparsity that wins."""
    rows = sorted({m for _, _, m in found})
    kinds = list(dict.fromkeys((values, pattern) for values, pattern, _ in found))
    lines = ["| values | pattern | " + " | ".join(f"M = {m}" for m in rows) + " |"]
    lines.append("|" + "---|" * (2 + len(rows)))
    for values, pattern in kinds:
        cells = [_first_win(found.get((values, pattern, m), {})) for m in rows]
        lines.append(f"| {values} | {pattern} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first_win(by_sparsity: Mapping[float, float]) -> str:
    """The lowest sparsity from which every higher one measured wins, and its ratio."""
    if not by_sparsity:
        return "-"
    wins = None
    for sparsity in sorted(by_sparsity, reverse=True):
        if by_sparsity[sparsity] <= 1:
            break
        wins = sparsity
    if wins is None:
        highest = max(by_sparsity)
        return f"never ({by_sparsity[highest]:.2f}x at {highest:.0%})"
    return f"{wins:.0%} ({by_sparsity[wins]:.2f}x)"


def main(arguments: Sequence[str]) -> int:
    """Print the table of a CSV file."""
    if len(arguments) != 1:
        print("usage: python -m bigops.benches.crossover FILE.csv", file=sys.stderr)
        return 2
    with Path(arguments[0]).open(newline="") as file:
        print(table(ratios(csv.DictReader(file))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
