"""Small cases that fell short once, each a script that exits 0 where a user gets what they expect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(Path(__file__).parent.glob("[0-9]*.py"))


# Each takes most of a minute; the room of each has the same in small, which runs everywhere.
LONG = {
    "54_load_peak_memory": "tests/compress/test_saved_damage.py, peak_of_loading",
    "56_freeze_torn": "tests/graph/test_atomic.py, freeze_",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_case_is_still_mended(case: Path, pytestconfig: pytest.Config) -> None:
    if case.stem in LONG and pytestconfig.getoption("--accept-share") < 1:
        pytest.skip(f"with --accept-share 1; its twin: {LONG[case.stem]}")
    done = subprocess.run([sys.executable, str(case)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_cases() -> None:
    assert len(CASES) >= 52
