"""Set-up shared by all tests. Runs before any test module imports triton."""

import os
import tempfile

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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
