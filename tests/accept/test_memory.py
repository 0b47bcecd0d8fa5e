"""100,000 calls of each op: resident memory grows by less than 1 MB."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests.accept.conftest import Accept
from tests.support.cases import memory as memory_cases

FULL = 100_000
MEGABYTE = 1 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not memory_cases.counted(), reason="no mallinfo2 in this C library"),
]


def resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_does_not_grow(accept: Accept) -> None:
    calls, grown, kept = accept.count(FULL if accept.share == 1 else FULL // 2), {}, {}
    for name, call in memory_cases.calls().items():
        for _ in range(500):
            call()
        gc.collect()
        before = resident()
        kept[name] = memory_cases.kept(call, calls)
        gc.collect()
        grown[name] = resident() - before
    accept.result(
        ops=len(grown),
        calls=calls,
        most_resident_bytes=max(grown.values()),
        most_bytes_a_call=round(max(kept.values()), 3),
    )
    assert not {name: size for name, size in grown.items() if size >= MEGABYTE}
    # The same bound for fewer calls: what malloc gave out, which does not come in whole pages.
    assert not {name: size for name, size in kept.items() if size >= MEGABYTE / FULL}
