"""Set-up shared by all tests. Runs before any test module imports triton."""

import csv
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# No test depends on what `bigops tune` measured on this machine, nor writes there.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bigops-tests-")

# Idle threads of one worker must not spin where another one works. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton reads this when a kernel is decorated: the unit suite runs kernels in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the long proofs in tests/accept, and of Triton's interpreter."""
    parser.addoption(
        "--accept-share", type=float, default=0.1, help="share of the cases of a long proof to run"
    )
    parser.addoption("--accept-json", help="file for the figures of the long proofs")
    parser.addoption(
        "--dot-seed",
        type=int,
        help="sum the terms of interpreted dots in orders drawn from this, one for each kernel",
    )


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m gpu` compiles the kernels; no test module has imported triton yet."""
    asked = config.option.markexpr
    if "gpu" in asked and "not gpu" not in asked:
        os.environ["TRITON_INTERPRET"] = "0"
    seed = config.getoption("--dot-seed")
    if seed is not None:
        from tests.support import triton_interpreter

        triton_interpreter.dot_seed = seed


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the levels between AVX-512 and the highest to the slow suite.

    Most kernels are those of one or the other. A case has a level by itself, or in a `Way`.
    """
    from tests.support.kernels_ran import BETWEEN

    for item in items:
        given = getattr(item, "callspec", None)
        values = given.params.values() if given is not None else ()
        if any(getattr(v, "level", v) in BETWEEN for v in values if isinstance(v, str | tuple)):
            item.add_marker("slow")
    # It builds csrc anew for minutes: begun last, it would leave the other worker idle.
    items.sort(key=lambda item: item.path.name != "test_sanitizers.py")


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
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "when")]
    _keep_figures(terminalreporter.config.getoption("--accept-json"), reports)
    _tell_of_gpu_kernels(terminalreporter, reports)


def _keep_figures(target: str | None, reports: list[pytest.TestReport]) -> None:
    """Write what the long proofs counted; the figures of those that did not run now stay."""
    found = {
        r.nodeid: {"passed": r.passed, **figures}
        for r in reports
        if r.when == "teardown" and (figures := dict(r.user_properties).get("accept"))
    }
    if target is None or not found:
        return
    failed = {r.nodeid for r in reports if r.failed}
    for name in failed & found.keys():
        found[name]["passed"] = False
    file = Path(target)
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(dict(sorted({**kept, **found}.items())), indent=1) + "\n")


def _tell_of_gpu_kernels(
    terminalreporter: pytest.TerminalReporter, reports: list[pytest.TestReport]
) -> None:
    """Say what the committed table of GPU kernels holds, and how much was compiled in this run."""
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
