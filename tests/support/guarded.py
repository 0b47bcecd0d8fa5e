"""Outputs of kernels between guards, so that a store beside them is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

GUARD = 1 << 14
POISON = -12345.0
WHOLE_POISON = 77  # in any integer dtype


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Outputs made inside lie between guards and start as NaN (integers as one odd number)."""
    allocate, buffers = torch.empty, []

    def empty(*size, **options):  # type: ignore[no-untyped-def]
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, torch.Size)) else size)
        buffer = allocate(shape.numel() + 2 * GUARD, **options)
        floating = buffer.is_floating_point()
        buffer.fill_(POISON if floating else WHOLE_POISON)
        buffers.append((buffer, shape.numel()))
        inside = buffer[GUARD : GUARD + shape.numel()]
        return inside.fill_(float("nan") if floating else ~WHOLE_POISON).view(shape)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = allocate
    for buffer, size in buffers:
        value = POISON if buffer.is_floating_point() else WHOLE_POISON
        poison = torch.full_like(buffer[:GUARD], value)
        before, after = buffer[:GUARD], buffer[GUARD + size :]
        intact = torch.equal(before, poison) and torch.equal(after, poison)
        assert intact, "a kernel stored outside its output"
