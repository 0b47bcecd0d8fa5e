"""The pictures of a benchmark: one PNG per op, one line per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigops.benches.rows import Compared, is_own
from bigops.files import replacing


def paths(rows: Sequence[Compared], path: str | Path) -> dict[str, Path]:
    """op -> file: the name asked for with the op behind its stem, ``bench-fused_linear.png``."""
    asked = Path(path)
    suffix = asked.suffix or ".png"
    ops = dict.fromkeys(row.op for row in rows)
    return {op: asked.with_name(f"{asked.stem}-{op}{suffix}") for op in ops}


def plot(rows: Sequence[Compared], path: str | Path) -> list[Path]:
    """Draw the speed-up over eager of ours, the best rival and the others, one PNG per op.

    A whole run in one picture was 40,000 pixels tall; a bar per provider made an op 90 inches.

    Returns:
        The files written.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot: needs matplotlib (pip install 'bigops[plot]')") from None
    written = paths(rows, path)
    for op, file in written.items():
        mine = [row for row in rows if row.op == op]
        cases = list(dict.fromkeys(row.case_key for row in mine))
        figure = Figure(figsize=(10, 1.6 + 0.34 * len(cases)))
        FigureCanvasAgg(figure)
        _draw(figure.add_subplot(), mine, cases)
        figure.tight_layout()
        with replacing(file) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    return list(written.values())


def _draw(axes: Any, rows: Sequence[Compared], cases: Sequence[str]) -> None:
    kinds: dict[str, tuple[list[Compared], dict[str, Any]]] = {
        "other rivals": ([], {"color": "0.65", "markersize": 3}),
        "best rival": ([], {"color": "tab:orange", "markersize": 5, "capsize": 2}),
        "bigops": ([], {"color": "tab:blue", "markersize": 6, "capsize": 2}),
    }
    for row in rows:
        rival = "best rival" if row.provider == row.best_rival else "other rivals"
        kinds["bigops" if is_own(row.provider) else rival][0].append(row)
    for label, (found, look) in kinds.items():
        ratios = [row.ratio_to_eager for row in found]
        below = [max(0.0, row.ratio_to_eager - row.ratio_low) for row in found]
        above = [max(0.0, row.ratio_high - row.ratio_to_eager) for row in found]
        places = [cases.index(row.case_key) for row in found]
        shown = None if label == "other rivals" else [below, above]
        axes.errorbar(ratios, places, xerr=shown, fmt="o", label=label, elinewidth=1, **look)
    axes.axvline(1.0, color="black", lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    best = {row.case_key: row.best_rival for row in rows}
    names = [f"{case.replace(chr(10), ' ')}\nbest rival: {best[case]}" for case in cases]
    axes.set_yticks(range(len(cases)), names, fontsize=6)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(axis="x", lw=0.3)
    axes.set_xlabel("speed-up over eager PyTorch (median of interleaved rounds, 95% interval)")
    axes.legend(fontsize=7, loc="best")
