"""One instruction set for all sides: names, order, and a CPU that is really held."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bigops.backend import machine
from bigops.benches.models import isa

CHILD = """
import sys
from bigops.benches.models import isa
assert "torch" not in sys.modules
isa.hold(sys.argv[1])
print(isa.held(), isa.onednn(), isa.amx_refused())
from bigops.backend import machine
print(machine.extension and machine.extension.isa())
import torch
print(torch.backends.cpu.get_cpu_capability())
"""


def held(level: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, level],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k not in isa.VARIABLES},
    )
    return done.stdout.split()


@pytest.mark.skipif("avx2" not in isa.flags(), reason="an x86-64 CPU with AVX2")
def test_a_process_is_held_below_what_its_cpu_has() -> None:
    assert held("avx2") == [
        "avx2",
        "avx2",
        "True",
        str(machine.extension and "avx2"),
        "AVX2",
    ]


@pytest.mark.skipif("amx_tile" not in isa.flags(), reason="a CPU with AMX")
def test_amx_is_granted_without_and_refused_with_a_level() -> None:
    free = [sys.executable, "-c", "from bigops.benches.models import isa; print(isa.amx_refused())"]
    assert subprocess.run(free, capture_output=True, text=True).stdout.strip() == "False"
    assert held("avx512_vnni")[2] == "True"


def test_an_unknown_level_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="isa: expected one of avx2, .*; got 'sse'"):
        isa.hold("sse")


def test_it_comes_too_late_once_torch_is_loaded() -> None:
    with pytest.raises(ValueError, match="before torch is loaded"):
        isa.hold("avx2")


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"}, "amx"),
        ({"avx2", "avx512f", "avx512_vnni"}, "avx512_vnni"),
        ({"avx2"}, "avx2"),
        (set(), "unknown"),
    ],
)
def test_the_best_level_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], best: str
) -> None:
    monkeypatch.setattr(isa, "flags", lambda: flags)
    monkeypatch.delenv(isa.VARIABLES[0], raising=False)
    assert isa.best() == isa.onednn() == best
    monkeypatch.setenv(isa.VARIABLES[0], "AVX2")
    assert isa.onednn() == "avx2"
