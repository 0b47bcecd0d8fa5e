"""One encoder, deployed once for a file of tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bigops
from tests.graph.deploy.encoder import Encoder, inputs


@pytest.fixture(scope="module")
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def deployed(model: Encoder) -> Any:
    return bigops.deploy(model, inputs(3, 7))
