"""No call of an op leaves memory behind; tests/accept/test_memory.py counts more of them."""

from __future__ import annotations

import ctypes

import pytest

from tests.support.cases import memory as memory_cases

CALLS = 400
STRING = 48  # bytes of one that is never freed: std::string with its chunk's header

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not memory_cases.counted(), reason="no mallinfo2 in this C library"),
]


@pytest.mark.parametrize("name", memory_cases.calls())
def test_a_call_keeps_no_memory(name: str) -> None:
    kept = memory_cases.kept(memory_cases.calls()[name], CALLS)
    assert kept < STRING / 2, f"{kept} bytes a call"


def test_a_kept_string_is_seen() -> None:
    """The planted fault: each call leaves what a string takes."""
    call, libc = memory_cases.calls()["fused_linear_none"], ctypes.CDLL(None)

    def leaking() -> None:
        call()
        libc.malloc(32)

    assert memory_cases.kept(leaking, CALLS) >= STRING / 2
