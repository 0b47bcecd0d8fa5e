"""Which kernels ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bigops.backend import machine

_recorders: list[list[str]] = []


def note(kernel: str) -> None:
    """Say that ``kernel`` runs now. Kernels written in Python call it; C++ ones say it below."""
    for names in _recorders:
        names.append(kernel)


@contextlib.contextmanager
def record() -> Iterator[list[str]]:
    """Collect the names of the kernels that run inside, in all threads.

    The list holds the Python-side kernels while inside and the C++ ones from the end of the block.
    """
    names: list[str] = []
    if machine.extension is not None:
        machine.extension.record_start()
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)
        if machine.extension is not None:
            names.extend(machine.extension.record_stop())
