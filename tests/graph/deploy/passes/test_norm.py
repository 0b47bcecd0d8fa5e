"""Norms of torch and norms that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigops.graph.deploy.passes import clean, norm
from tests.graph.deploy.passes.exported import rewritten


class WrittenOut(nn.Module):
    """As models of transformers write it, in the dtype of x."""

    def __init__(self, weight_first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24))
        self.first = weight_first

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = wide.to(x.dtype)
        return self.weight * y if self.first else y * self.weight


def _run(graph: object) -> int:
    clean.run(graph)  # type: ignore[arg-type]
    return norm.run(graph)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(24),
        nn.LayerNorm(24, elementwise_affine=False),
        nn.LayerNorm(24, bias=False),
        nn.RMSNorm(24, eps=1e-6),
        nn.RMSNorm(24),
        WrittenOut(True),
        WrittenOut(False),
    ],
    ids=str,
)
def test_norms_become_one_op(module: nn.Module) -> None:
    found = rewritten(_run, module, torch.randn(5, 3, 24))
    assert found.after == {"norm": 1}
    assert found.count == 1


class Sum(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.norm, self.again = nn.LayerNorm(24), again

    def forward(self, x: Tensor) -> Tensor:
        total = x + x.sin()
        return self.norm(total) + total if self.again else self.norm(total)


@pytest.mark.parametrize("again", [False, True])
def test_a_sum_that_only_the_norm_reads_goes_into_it(again: bool) -> None:
    found = rewritten(_run, Sum(again), torch.randn(5, 3, 24))
    assert found.after["norm"] == 1
    assert found.after["add"] == (2 if again else 0)


class Other(nn.Module):
    """Two dimensions, and a mean over another one: not what the op computes."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.LayerNorm([3, 24])

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x) + x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def test_other_norms_stay() -> None:
    found = rewritten(_run, Other(), torch.randn(5, 3, 24))
    assert found.count == 0
    assert found.after["rsqrt"] == 1
