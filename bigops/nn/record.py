"""What `fuse_`, `pack_`, `compress_` and `freeze_` did to a model and what they left, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bigops.timing import Ratio


@dataclass(frozen=True)
class Done:
    """One layer that was swapped.

    ``speedup`` is old time / new time with its 95% interval, where ``example_inputs`` allowed to
    measure; ``why`` says what the decision rests on.
    """

    name: str
    what: str
    why: str
    bytes_before: int = 0
    bytes_after: int = 0
    density: float = 1.0
    us_before: float | None = None
    us_after: float | None = None
    speedup: Ratio | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {self.what}"
        if self.bytes_before != self.bytes_after:
            text += f", {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        if self.us_before is not None and self.us_after is not None:
            text += f", {self.us_before:.0f} -> {self.us_after:.0f} us"
        return f"{text} ({self.why})"


@dataclass(frozen=True)
class Skipped:
    """One layer that stays as it was, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: left as it is: {self.reason}"


@dataclass(frozen=True)
class Record:
    """The outcome of one verb on one model; print it, or take `to_dict()`."""

    verb: str
    done: list[Done] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        for entry in data["done"]:
            if entry["speedup"] is not None:
                entry["speedup"] = list(entry["speedup"])
        return data

    def reason(self, name: str) -> str | None:
        """Why the layer ``name`` was left, or None if it was not."""
        return next((entry.reason for entry in self.skipped if entry.name == name), None)

    def __str__(self) -> str:
        head = f"{self.verb}: {len(self.done)} done, {len(self.skipped)} left"
        return "\n  ".join([head, *map(str, self.done), *map(str, self.skipped), *self.notes])
