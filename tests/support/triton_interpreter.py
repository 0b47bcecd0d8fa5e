"""Triton's interpreter as the tests use it: repaired, and with checks of bounds and races.

`install()` puts the repair in place (interpreter_repair.py), and does nothing where kernels are
compiled: on a GPU the tests import what they import here, and no part of triton is changed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

TRIED = ((3, 8), (3, 9))  # versions of triton whose interpreter the repair was written against

behind_tables: list[torch.Tensor] = []  # which the kernels inside `reachable` may touch, too
# Called as see(launch, "read" or "written", addresses, bytes of each) for every load and store.
observers: list[Callable[[Any, str, Any, int], None]] = []
checking = True
# Not None: the terms of each dot are summed in an order drawn from this, the kernel and its tile.
# Libraries differ in it from one CPU to the next, so no test may rest on equal bits of two kernels.
dot_seed: int | None = None


def why_not(version: str) -> str:
    """Why the interpreter of this triton is not repaired, or ""."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) in TRIED:
        return ""
    tried = " and ".join(f"{major}.{minor}" for major, minor in TRIED)
    return f"the repair of triton's interpreter was written for {tried}; this is {version}"


def install() -> None:
    """Repair the interpreter of this process, once; skip the test or module where none fits."""
    import triton

    if not triton.knobs.runtime.interpret:
        return
    if reason := why_not(triton.__version__):
        pytest.skip(reason, allow_module_level=True)
    from tests.support import interpreter_repair

    interpreter_repair.apply()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Switch the bounds and race checks off, as on hardware."""
    global checking
    checking = False
    try:
        yield
    finally:
        checking = True


@contextlib.contextmanager
def reachable(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Kernels launched inside may also touch these tensors, whose addresses stand in a table."""
    before = len(behind_tables)
    behind_tables.extend(tensors)
    try:
        yield
    finally:
        del behind_tables[before:]
