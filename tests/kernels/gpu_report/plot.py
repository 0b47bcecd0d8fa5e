"""A picture of the committed table of compiled GPU kernels: docs/gpu_report.png.

    python tests/kernels/gpu_report/report.py --plot

For each kernel and device over all rows of both: the most registers of a thread; the most shared
memory of a program, as a share of what the device gives one; and the share of its warps that a
multiprocessor holds, in the middle of the rows, with what limits most of them.
"""

from __future__ import annotations

import hashlib
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.kernels.gpu_report.devices import ARCHS, most_shared, most_warps
from tests.kernels.gpu_report.golden import Row

PICTURE = Path(__file__).resolve().parents[3] / "docs" / "gpu_report.png"
PANELS = (
    ("registers", "most registers of a thread"),
    ("shared", "most shared memory of a program, % of the device's"),
    ("occupancy", "median warps held, % of the device's, and what limits"),
)
LETTERS = {"registers": "R", "shared": "S", "warps": "W", "programs": "P"}


class Cell(NamedTuple):
    """A kernel on a device."""

    rows: int
    registers: int  # the most of a thread
    shared: int  # % of what a program may have, the most
    occupancy: int  # % of the warps of a multiprocessor, the median
    limiter: str  # of most rows; of as many, the first by name


def cells(rows: Sequence[Row]) -> dict[tuple[str, str], Cell]:
    """By kernel, in the order of the table, and device."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["arch"]].append(row)
    return {key: _cell(key[1], group) for key, group in groups.items()}


def _cell(arch: str, rows: Sequence[Row]) -> Cell:
    held = [int(row["programs_per_sm"]) * int(row["warps"]) / most_warps(arch) for row in rows]
    limiters = Counter(str(row["limiter"]) for row in rows)
    return Cell(
        len(rows),
        max(int(row["registers"]) for row in rows),
        round(100 * max(int(row["shared_bytes"]) for row in rows) / most_shared(arch)),
        round(100 * statistics.median(held)),
        min(limiters, key=lambda name: (-limiters[name], name)),
    )


def digest(rows: Sequence[Row]) -> str:
    """Of what the picture shows; it stands in the picture's file as its source."""
    shown = repr(sorted(cells(rows).items()))
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def draw(rows: Sequence[Row], path: Path = PICTURE) -> None:
    """Write the picture of a table as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    shown = cells(rows)
    kernels = list(dict.fromkeys(kernel for kernel, _ in shown))
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(15, 1.6 + 0.3 * len(kernels)), sharey=True, layout="constrained"
    )
    for axis, (field, title) in zip(axes, PANELS, strict=True):
        top = 255 if field == "registers" else 100
        grid = [
            [getattr(shown[k, a], field) if (k, a) in shown else float("nan") for a in ARCHS]
            for k in kernels
        ]
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1.25 * top, aspect="auto")
        for (kernel, arch), cell in shown.items():
            text = str(getattr(cell, field))
            if field == "occupancy":
                text += f" {LETTERS[cell.limiter]}"
            at = (ARCHS.index(arch), kernels.index(kernel))
            dark = getattr(cell, field) > 0.8 * top
            axis.annotate(
                text, at, ha="center", va="center", fontsize=9, color="white" if dark else "black"
            )
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(ARCHS)), ARCHS, fontsize=8.5)
        axis.set_yticks(range(len(kernels)), kernels, fontsize=9)
        axis.tick_params(length=0)
    figure.suptitle(
        f"{len(kernels)} Triton kernels in {len(rows)} rows, compiled and read, not timed. "
        "R registers, S shared memory, W warps, P programs",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    source = PngInfo()
    source.add_text("Source", digest(rows))
    with Image.open(drawn) as picture:  # 64 colours: a third of the bytes
        picture.convert("RGB").quantize(64).save(path, "PNG", optimize=True, pnginfo=source)
