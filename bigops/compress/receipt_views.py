"""A receipt as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bigops.timing import Ratio

if TYPE_CHECKING:
    from bigops.compress.receipt import Receipt, Side

_BEFORE, _AFTER, _OTHER = "#8a8f98", "#1f77b4", "#e07b39"


def tables(receipt: Receipt) -> RenderableType:
    """The whole, the layers and the verdict, for rich; fits 80 columns."""
    verdict = receipt.breaches()
    lines = [_ratios(receipt)]
    lines += [Text(f"layer {row.name}: {row.kind} by {row.kernel}") for row in receipt.layers]
    lines += [Text(note, style="dim") for note in receipt.notes]
    if verdict:
        lines += [Text(f"BREACHED  {line}", style="bold red") for line in verdict]
    elif receipt.floors != type(receipt.floors)():
        lines.append(Text("every floor holds", style="bold green"))
    return Group(_whole(receipt), _layers(receipt), *lines)


def _whole(receipt: Receipt) -> Table:
    threads, shape = receipt.machine.get("threads", "?"), receipt.machine.get("input", "?")
    table = Table(title=f"Receipt: input {shape}, {threads} threads", title_justify="left")
    table.add_column("", no_wrap=True)
    sides = [receipt.before, *([receipt.compiled] if receipt.compiled else []), receipt.after]
    for side in sides:
        table.add_column(side.name, justify="right", no_wrap=True)
    table.add_column("eager / bigops", justify="right", no_wrap=True)

    def row(name: str, cells: list[str], last: str) -> None:
        table.add_row(name, *cells, last)

    drop, old, new = receipt.drop, receipt.before, receipt.after
    row("accuracy", [_percent(s) for s in sides], "" if drop is None else f"{0 - drop:+.2f} points")
    times = [f"{s.latency_us:,.0f} us" for s in sides]
    row("latency, median", times, f"{receipt.speedup.value:.2f}x")
    row("  spread", [f"{100 * s.spread:.0f}%" for s in sides], "")
    whole = old.bytes_memory / max(1, new.bytes_memory)
    row("bytes in memory", [_bytes(s.bytes_memory) for s in sides], f"{whole:.2f}x")
    if old.bytes_disk and new.bytes_disk:
        ratio = f"{old.bytes_disk / new.bytes_disk:.2f}x"
        row("bytes on disk", [_bytes(s.bytes_disk) for s in sides], ratio)
    if old.peak_bytes and new.peak_bytes:
        ratio = f"{old.peak_bytes / new.peak_bytes:.2f}x"
        row("peak memory", [_bytes(s.peak_bytes) for s in sides], ratio)
    return table


def _ratios(receipt: Receipt) -> Text:
    text = f"speed-up over eager {_interval(receipt.speedup)}"
    if receipt.speedup_compile is not None:
        text += f", over torch.compile {_interval(receipt.speedup_compile)}"
    rounds = receipt.machine.get("pairs", "?")
    return Text(f"{text}\n  (95% interval, {rounds} interleaved rounds)")


def _layers(receipt: Receipt) -> Table:
    table = Table(title="Layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("[N, K]", "density", "bytes", "us"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in receipt.layers:
        times = "-"
        if row.us_before is not None and row.us_after is not None:
            times = f"{row.us_before:,.0f} -> {row.us_after:,.0f}"
        table.add_row(
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            f"{row.density:.2f}",
            f"{_bytes(row.bytes_before)} -> {_bytes(row.bytes_after)}",
            times,
        )
    return table


def _percent(side: Side) -> str:
    return "-" if side.accuracy is None else f"{side.accuracy:.2f}%"


def _interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def draw(receipt: Receipt, path: Path) -> None:
    """Write the picture as PNG: accuracy against latency, then bytes and times per layer.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise ModuleNotFoundError(
            "matplotlib: the receipt's picture needs it: pip install 'bigops[plot]'",
            name="matplotlib",
        ) from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")  # no global state, no display
    points, sizes, times = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))

    marks = [(receipt.before, _BEFORE), (receipt.after, _AFTER)]
    if receipt.compiled is not None:
        marks.insert(1, (receipt.compiled, _OTHER))
    known = [(c.latency_us, c.accuracy) for c in receipt.candidates if c.accuracy is not None]
    if known:
        points.scatter(
            *zip(*known, strict=True),
            color=_AFTER,
            alpha=0.35,
            marker="s",
            s=30,
            label="tried (validation split)",
        )
    for candidate in receipt.candidates:
        if candidate.accuracy is not None:
            points.annotate(
                candidate.name,
                (candidate.latency_us, candidate.accuracy),
                textcoords="offset points",
                xytext=(4, -11),
                fontsize=7,
            )
    for side, colour in marks:
        height = side.accuracy if side.accuracy is not None else 0.0
        points.scatter([side.latency_us], [height], color=colour, s=70, label=side.name, zorder=3)
    if receipt.floors.max_drop is not None and receipt.before.accuracy is not None:
        points.axhline(
            receipt.before.accuracy - receipt.floors.max_drop,
            color="#c44",
            lw=1,
            ls="--",
            label="least accuracy asked for",
        )
    if receipt.floors.min_speedup is not None:
        points.axvline(
            receipt.before.latency_us / receipt.floors.min_speedup,
            color="#c44",
            lw=1,
            ls=":",
            label="largest latency asked for",
        )
    points.set(
        xlabel=f"latency, µs (input {receipt.machine.get('input', '?')}), log scale",
        ylabel="test accuracy, %",
        title=f"{receipt.speedup.value:.1f}x faster than eager, {receipt.size_ratio:.1f}x smaller",
        xscale="log",
    )
    # plain numbers, few enough not to touch: the default writes 2 x 10^2 at every tick
    points.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    points.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    points.xaxis.set_minor_formatter(NullFormatter())
    points.legend(fontsize=8, loc="center right")  # eager lies top right, the small model left
    points.grid(alpha=0.3)

    names = [row.name for row in receipt.layers]
    at = range(len(names))
    sizes.bar(
        [i - 0.2 for i in at],
        [r.bytes_before / 1e3 for r in receipt.layers],
        0.4,
        color=_BEFORE,
        label="before",
    )
    sizes.bar(
        [i + 0.2 for i in at],
        [r.bytes_after / 1e3 for r in receipt.layers],
        0.4,
        color=_AFTER,
        label="after",
    )
    sizes.set(title="bytes per layer", ylabel="kB, log scale", yscale="log")
    times.bar(
        [i - 0.2 for i in at],
        [r.us_before or 0 for r in receipt.layers],
        0.4,
        color=_BEFORE,
        label="before",
    )
    times.bar(
        [i + 0.2 for i in at],
        [r.us_after or 0 for r in receipt.layers],
        0.4,
        color=_AFTER,
        label="after",
    )
    times.set(title="time per layer", ylabel="µs, log scale", yscale="log")
    for axes in (sizes, times):
        axes.set_xticks(list(at), names)
        axes.set_xlabel("layer")
        axes.legend(fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, format="png", dpi=130)
