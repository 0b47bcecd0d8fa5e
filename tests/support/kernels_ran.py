"""Which kernels ran: every kernel test asserts it, so that no reference stands in quietly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from bigops import backend
from bigops.backend import machine

needs_extension = pytest.mark.skipif(
    machine.extension is None, reason=f"no C++ extension: {machine.extension_error}"
)
ISAS: list[str] = list(machine.extension.isas()) if machine.extension else []

# Levels whose cases the slow suite runs: above AVX-512 and below the highest.
BETWEEN = [level for level in ISAS[:-1] if level not in ("portable", "avx2", "avx512")]

_LEVELS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")


def served_by(level: str, *adds: str) -> str:
    """The instruction set of the kernel that serves at ``level``: the highest one not above it.

    Every kernel is there for the first three; ``adds`` are the others that it is there for.
    """
    there = (*_LEVELS[:3], *adds)
    return max(filter(_LEVELS[: _LEVELS.index(level) + 1].__contains__, there), key=_LEVELS.index)


def named(op: str, fragment: str) -> str:
    """Part of the names of the kernels that serve ``op``; without them that of the reference."""
    return f"reference.{op}" if machine.extension is None else fragment


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Run CPU kernels at an instruction set of this machine."""
    assert machine.extension is not None
    before = machine.extension.set_isa(name)
    machine.extension.set_bf16_dot(True)  # every kernel of the level, whether it pays here or not
    try:
        yield
    finally:
        machine.extension.set_isa(before)
        machine.extension.set_bf16_dot(machine.crossovers().bf16_dot)


@contextlib.contextmanager
def expect(*fragments: str) -> Iterator[None]:
    """Fail unless, for each fragment, some kernel ran whose name holds it, and no reference ran."""
    with backend.record() as names:
        yield
    for fragment in fragments:
        assert any(fragment in name for name in names), f"no {fragment!r} among {names}"
    assert not any(name.startswith("reference.") for name in names), f"a reference ran: {names}"


@contextlib.contextmanager
def crossover(op: str, dtype: str, max_rows: int, max_flops: int) -> Iterator[None]:
    """Move the hand-over between our kernel and torch's product for one dtype."""
    assert machine.extension is not None
    try:
        machine.extension.set_crossover(op, dtype, max_rows, max_flops)
        yield
    finally:
        machine.apply_crossovers()
