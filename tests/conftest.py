"""Set-up shared by all tests. Runs before any test module imports triton."""

import os

# Triton reads this when a kernel is decorated: the unit suite runs kernels in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
