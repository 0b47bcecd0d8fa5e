"""What crossovers and tiles share: timers, and the file that keeps what was measured.

A file is written step by step, so that a run that was cut off goes on where it stopped. Several
processes may tune at a time: the last to measure a step wins, and nothing is half-written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bigops.files import locked, replacing

Calls = Mapping[str, Callable[[], object]]
Timer = Callable[[Calls], Mapping[str, float]]
"""Seconds by name for calls by name."""
Report = Callable[[str], None]


def check_dtypes(dtypes: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError where one of ``dtypes`` is not ``known``."""
    for dtype in dtypes:
        if dtype not in known:
            raise ValueError(f"dtype: expected one of {', '.join(known)}; got {dtype!r}")


@dataclass(frozen=True)
class TunedFile:
    """The file in the user's cache that keeps what was measured on one machine.

    Attributes:
        kind: `backend.crossover` or `backend.gpu_tiles`: format, place and checks of the file.
        machine: what the numbers depend on, as ``kind.machine`` gives it.
        sections: mappings that it holds.
    """

    kind: ModuleType
    machine: Mapping[str, Any]
    sections: tuple[str, ...]

    @property
    def path(self) -> Path:
        return Path(self.kind.tuned_file(self.machine))

    def prepare(self) -> None:
        """Raise OSError where it cannot be written, before minutes are spent on measuring."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.editing():
            pass

    def content(self) -> dict[str, Any]:
        """What it holds; empty sections where it is missing or cannot serve."""
        data = {"format": self.kind.FORMAT, "machine": dict(self.machine)}
        data |= {name: {} for name in self.sections}
        with contextlib.suppress(FileNotFoundError, ValueError):
            data |= self.kind.read(self.path, self.machine)
        return data

    @contextlib.contextmanager
    def editing(self) -> Iterator[dict[str, Any]]:
        """Give what it holds while no other process writes; at the end it is written, whole."""
        with locked(self.path):
            data = self.content()
            yield data
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(data, indent=1) + "\n")
