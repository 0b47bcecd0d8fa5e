"""`bigops tune`: measure what is faster on this machine, and keep it for later starts of Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigops.tune import crossovers, tiles

__all__ = ["tune"]


def tune(device: str = "cpu", **options: Any) -> Path:
    """Measure the crossovers of this CPU, or the tiles of a GPU's kernels; give the tuned file.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        **options: as `crossovers.tune` or `tiles.tune` takes them.

    Raises:
        ValueError: no such device, or an option that its measuring refuses.
        RuntimeError: "cpu" without the C++ extension.
        OSError: the cache folder cannot be written.
    """
    if device == "cpu":
        return crossovers.tune(**options)
    return tiles.tune(tiles.target_of(device), **options)
