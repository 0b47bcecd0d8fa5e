"""Run cases of ttsem_child.py in a process of their own, under ttsem.

ttsem executes the code that Triton makes of a kernel (its TTIR for sm_90) on the CPU tensors of the
launch. Interpreted kernels cannot be compiled in the same process, hence the other one. `make dev`
puts ttsem into the folder `ttsem` of the virtual environment; elsewhere it may be on the path.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import bigops
from bigops.backend import machine

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(sys.prefix) / "ttsem"
TRIED = ("3.8.", "3.9.")  # versions of triton: ttsem reads the text of their TTIR


class Verdict(NamedTuple):
    """What came of one case."""

    said: str  # "clean", "oob_write", "oob_read", "race", "poison", "unjudged", "wrong values"
    kernels: list[str]  # the launches, in order
    names: list[str]  # what `backend.record` says ran
    races_unchecked: int  # launches too large to be checked for races
    message: str


def _environment() -> dict[str, str]:
    path = [str(ROOT), str(FOLDER) if FOLDER.is_dir() else "", os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(ROOT / "build" / "ttsem"),
        "OMP_NUM_THREADS": "1",
    }


@functools.cache
def lacks() -> str:
    """Why nothing can be run under ttsem here, or ""."""
    if not machine.has_triton():
        return "triton is not installed"
    version = bigops.report()["triton"]
    if not version.startswith(TRIED):
        return f"ttsem 0.1.0 was tried with triton {'x and '.join(TRIED)}x; this is {version}"
    if not FOLDER.is_dir() and importlib.util.find_spec("ttsem") is None:
        return "ttsem is not installed (`make dev` fetches it)"
    command = [sys.executable, "-c", "import ttsem.sanitize"]
    tried = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if tried.returncode == 0:
        return ""
    return f"ttsem does not load: {(tried.stderr.splitlines() or ['no word'])[-1]}"


def judge(*cases: str) -> dict[str, Verdict]:
    """The verdicts of these cases of ttsem_child.py, all by one process."""
    command = [sys.executable, "-m", "tests.kernels.ttsem_child", *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, env=_environment(), cwd=ROOT, timeout=2400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {line.pop("case"): Verdict(**line) for line in found}
