"""Bytes that interpreted Triton kernels load and store, counted by the element, masked ones left
out.

`once` counts each byte of a tensor once a launch: what must come from memory however well an L2
cache serves; `all` counts what the programs ask for, which depends on the tiles.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support import triton_interpreter


@dataclass
class Launch:
    """Of one launch: bytes by "read" or "written", then by the name of the kernel's argument."""

    kernel: str
    all: dict[str, dict[str, int]] = field(default_factory=lambda: _nothing())
    once: dict[str, dict[str, int]] = field(default_factory=lambda: _nothing())


def _nothing() -> dict[str, dict[str, int]]:
    return {"read": defaultdict(int), "written": defaultdict(int)}


class Traffic(list[Launch]):
    """The launches, in order."""

    def sums(self, count: str) -> tuple[int, int]:
        """(bytes read, bytes written) over all launches; ``count``: "once" or "all"."""
        read, written = (
            sum(sum(getattr(launch, count)[way].values()) for launch in self)
            for way in ("read", "written")
        )
        return read, written

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self]


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count the launches made inside; the sums hold from the end of the block."""
    traffic = Traffic()
    found: list[tuple[Any, dict[tuple[str, str], list[np.ndarray]]]] = []

    def see(launch: Any, way: str, addresses: np.ndarray, size: int) -> None:
        if not found or found[-1][0] is not launch:
            found.append((launch, defaultdict(list)))
            traffic.append(Launch(launch.kernel))
        if addresses.size:
            name = launch.tensor_at(int(addresses.min()))
            traffic[-1].all[way][name] += addresses.size * size
            found[-1][1][way, name].append((addresses[:, None] + np.arange(size)).ravel())

    triton_interpreter.observers.append(see)
    try:
        yield traffic
    finally:
        triton_interpreter.observers.remove(see)
    for launch, (_, touched) in zip(traffic, found, strict=True):
        for (way, name), parts in touched.items():
            launch.once[way][name] = np.unique(np.concatenate(parts)).size
