"""The table of recipes, from the JSON that their runs wrote.

    python docs/recipes_table.py RUN/result.json ..   keep these runs in recipes.json; print
    python docs/recipes_table.py                      print the table of the runs that are kept

One run is kept of each recipe, precision and seed: the newest. `docs/readme_output.py` is of the
blocks of README.md; this table is printed, and goes where a person puts it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigops.files import replacing
from bigops.recipes.catalog import RECIPES

KEPT = Path(__file__).with_name("recipes.json")
_LEFT_OUT = ("curves", "values")  # of a run: the plot has them


def merged(
    kept: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The runs to keep, in the catalogue's order.

    Raises:
        ValueError: a run of other length than the recipe's own, of which no bar was asked.
    """
    found = {}
    for run in (*kept, *new):
        if run["holds"] is None:
            raise ValueError(f"{run['recipe']}: expected a whole run; got one with --epochs")
        options = run["options"]
        found[run["recipe"], options["precision"], options["seed"]] = {
            name: value for name, value in run.items() if name not in _LEFT_OUT
        }
    names = list(RECIPES)
    return [found[key] for key in sorted(found, key=lambda key: (names.index(key[0]), *key[1:]))]


def table(runs: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: a row for each recipe and precision, its seeds together."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["recipe"], run["options"]["precision"]), []).append(run)
    lines = [
        "| recipe | what | precision | result | bar | seconds (of the CPU) | needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, precision), of in groups.items():
        recipe = RECIPES[name]
        values = ", ".join(f"{run['value']:.4g}" for run in of)
        seeds = f" (seeds {', '.join(str(run['options']['seed']) for run in of)})"
        sign = "≥" if recipe.higher else "≤"
        times = ", ".join(f"{run['seconds']:.0f} ({run['cpu_seconds']:.0f})" for run in of)
        cells = [
            f"`{name}`",
            recipe.purpose,
            precision,
            f"{recipe.metric} {values}{recipe.unit}{seeds if len(of) > 1 else ''}",
            f"{sign} {recipe.bar:g}",
            times,
            f"`{recipe.installs}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Keep the runs that are named, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="result.json files")
    args = parser.parse_args(argv)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else []
    runs = merged(kept, [json.loads(path.read_text()) for path in args.results])
    if args.results:
        with replacing(KEPT) as temporary:
            temporary.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
