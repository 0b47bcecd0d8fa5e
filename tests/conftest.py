"""Set-up shared by all tests. Runs before any test module imports triton."""

import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# No test depends on what `bigops tune` measured on this machine, nor writes there.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bigops-tests-")

# Triton reads this when a kernel is decorated: the unit suite runs kernels in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m gpu` compiles the kernels; no test module has imported triton yet."""
    asked = config.option.markexpr
    if "gpu" in asked and "not gpu" not in asked:
        os.environ["TRITON_INTERPRET"] = "0"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Triton's interpreter is serial: torch's idle threads only spin beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the committed table of GPU kernels holds, and how much was compiled in this run."""
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "when")]
    compiled = [dict(r.user_properties).get("gpu_rows", 0) for r in reports if r.when == "call"]
    if not any(compiled):
        return
    with (Path(__file__).parent / "golden" / "gpu_report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kernels = {row["kernel"] for row in rows}
    archs = sorted({row["arch"] for row in rows})
    spills = sum(int(row["spill_bytes"]) for row in rows)
    terminalreporter.write_sep("-", "GPU kernels, compiled for GPUs that are not here")
    terminalreporter.write_line(
        f"{len(rows)} rows of {len(kernels)} Triton kernels x configs for {', '.join(archs)}; "
        f"{spills} bytes spilled; {sum(compiled)} rows compiled in this run"
    )
