"""Products by the tile registers of AMX on any CPU: their blocks over registers made of memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc.test_extension import ROOT
from tests.csrc.test_sanitizers import DEBUG, SANITIZE, lacks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacks()), reason=lacks())]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiles") / "emulated_tiles"
    source = Path(__file__).with_name("emulated_tiles.cpp")
    command = ["g++", "-std=c++17", "-ffp-contract=off", *DEBUG, *SANITIZE]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def run(binary: Path, planted: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary), planted], capture_output=True, text=True)


def test_tiles_give_what_the_portable_kernels_do(binary: Path) -> None:
    """Every shape of blocks, tails of K, groups and zero points, and no byte past an end."""
    ran = run(binary)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout == "560 cases\n"


def test_a_wrong_weight_is_seen(binary: Path) -> None:
    """The planted fault: one bit of a weight flipped for the tiles alone."""
    ran = run(binary, "flipped")
    assert ran.returncode == 1, ran.stderr[-3000:]
    assert ran.stdout.startswith("rows 1 tiles 1 k 1 ")


def test_a_read_past_the_rows_of_x_is_seen(binary: Path) -> None:
    """The planted fault: x ends with its last row, where a register may hold more."""
    ran = run(binary, "short")
    assert ran.returncode != 0
    assert "heap-buffer-overflow" in ran.stderr
