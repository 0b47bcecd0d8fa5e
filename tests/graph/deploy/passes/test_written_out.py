"""Activations that are written out, and formulas that only look like them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bigops.graph.deploy.passes import written_out
from tests.graph.deploy.passes.exported import rewritten

SCALE = math.sqrt(2 / math.pi)


class Formula(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "gpt2":
            inner = torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0)))
            return 0.5 * x * (1.0 + inner)
        if self.name == "products":
            return x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * ((x * x) * x)))) * 0.5
        if self.name == "silu":
            return x * torch.sigmoid(x)
        if self.name == "quick":
            return x * torch.sigmoid(1.702 * x)
        if self.name == "other scale":
            return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))
        if self.name == "other factor":
            return 0.25 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0))))
        y = x.sin()
        return 0.5 * y * (1.0 + torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(("name", "op"), [("gpt2", "gelu"), ("products", "gelu"), ("silu", "silu")])
def test_the_formula_becomes_the_call(name: str, op: str) -> None:
    found = rewritten(written_out.run, Formula(name), torch.randn(5, 7) * 3)
    assert found.after == {op: 1}


@pytest.mark.parametrize("name", ["quick", "other scale", "other factor", "of another x"])
def test_other_formulas_stay(name: str) -> None:
    found = rewritten(written_out.run, Formula(name), torch.randn(5, 7) * 3, exact=True)
    assert found.count == 0
