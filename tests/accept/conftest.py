"""Long proofs: CI's slow suite runs a tenth of each, `make accept` all of it.

`make accept` writes what each proof counted, with date and machine, into results.json beside this
file, which is committed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
import torch

from bigops.backend import machine


class Accept:
    """How many cases a proof runs, and where its figures go."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.figures: dict[str, object] = {}

    def count(self, full: int) -> int:
        """The cases to run of ``full``: at least one."""
        return max(1, round(full * self.share))

    def result(self, **figures: object) -> None:
        """Keep what was counted: plain numbers and words."""
        self.figures.update(figures)


def figures_of(code: str) -> dict[str, Any]:
    """What a process of its own prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> Iterator[Accept]:
    proof = Accept(request.config.getoption("--accept-share"))
    yield proof
    figures = {"share": proof.share, **proof.figures, "on": _machine()}
    request.node.user_properties.append(("accept", figures))


def _machine() -> dict[str, object]:
    extension = machine.extension
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "isas": list(extension.isas()) if extension else [],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
