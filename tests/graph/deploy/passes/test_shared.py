"""A block that runs several times has its weights once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.graph.deploy.passes import shared
from tests.graph.deploy.passes.exported import graph_of


class Repeated(nn.Module):
    """One layer several times, then another of the same shape."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.other, self.times = nn.Linear(256, 256), nn.Linear(256, 256), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.relu(self.layer(x))
        return self.other(x)


CONFIGS = [None, bigops.Int8(), bigops.Sparse(0.5) + bigops.Int8()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_layer_of_several_calls_takes_the_bytes_of_one(config: object, tmp_path: Path) -> None:
    x, made = torch.randn(4, 256), {}
    for times in (1, 3):
        torch.manual_seed(0)
        model = Repeated(times).eval()
        if config is not None:
            bigops.compress_(model, config)
        made[times] = bigops.deploy(model, x)
    nbytes = {times: sum(b.nbytes for b in one.buffers()) for times, one in made.items()}
    assert nbytes[3] == nbytes[1]
    expected = made[3](x)
    bigops.save(made[3], tmp_path / "m.bigops")
    assert torch.equal(bigops.load(tmp_path / "m.bigops")(x), expected)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(2))
        self.register_buffer("b", torch.zeros(2))
        self.register_buffer("c", torch.tensor([0.0, -0.0]))
        self.register_buffer("d", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.a.add_(x)
        self.b.add_(2 * x)
        return self.a + self.b + 1 / self.c + 1 / self.d


def test_what_is_written_or_differs_in_a_bit_stays() -> None:
    graph = graph_of(Counts(), torch.ones(2))
    assert shared.run(graph) == 0
