"""u8 between layers with static activations, where each reader takes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bigops
from bigops.graph.deploy.passes import epilogue, u8_chain
from tests.graph.deploy.passes.exported import calls, graph_of


class Chain(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        z = self.c(nn.functional.gelu(self.b(y)))
        return z + y[..., :32] if self.again else z


def _static(again: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Chain(again).eval()
    config = bigops.Int8(activations="static")
    bigops.compress_(model, config, data=[torch.randn(8, 64) for _ in range(4)])
    return model


@torch.no_grad()
def _run(again: bool) -> tuple[dict[str, int], int, float]:
    model, x = _static(again), torch.randn(5, 64)
    graph = graph_of(model, x)
    epilogue.run(graph)
    graph.recompile()
    plain = graph(x)
    count = u8_chain.run(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return dict(calls(graph)), count, float((graph(x) - plain).abs().max())


def test_each_product_stores_what_the_next_would_round() -> None:
    found, count, error = _run(again=False)
    assert count == 2
    assert found == {"quantized_linear_u8": 3}
    assert error == 0.0  # the same u8, made in the epilogue


def test_a_result_that_is_read_as_floats_stays_floating() -> None:
    _, count, error = _run(again=True)
    assert count == 1
    assert error == 0.0
