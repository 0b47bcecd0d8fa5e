"""Own kernels serve these tests, wherever this machine hands over to torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from bigops.backend import machine
from tests.support.cases.attention import DTYPES
from tests.support.kernels_ran import crossover


@pytest.fixture(autouse=True)
def own_kernels() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for dtype in DTYPES if machine.extension is not None else ():
            stack.enter_context(crossover("attention", dtype, 1 << 40, 0))
        yield
