"""What a call allocates, counted by torch's profiler: every block of its CPU allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Use:
    """Bytes of one call: the most that it held at a time, and what its result holds."""

    peak: int
    kept: int

    @property
    def working(self) -> int:
        """What it held beyond its result."""
        return self.peak - self.kept


def measure(call: Callable[[], Any]) -> Use:
    """Count the allocations of one call, whose result stays alive until the count ends.

    Scratch memory that oneDNN or MKL take from the system for themselves is not seen.
    """
    call()  # what is made once and kept: caches of primitives, compiled code
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return Use(peak, now)
