"""x is quantised once for the products that read it, behind a norm in its own pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.graph.deploy.passes import norm, quantize_once
from tests.graph.deploy.passes.exported import calls, graph_of
from tests.support import tolerance


class Gate(nn.Module):
    """Two readers of a norm, and the norm's own result besides."""

    def __init__(self, normed: bool, again: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64) if normed else nn.Identity()
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
        self.again = again

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(x)
        y = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return (y, x * 2) if self.again else (y,)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("config", [bigops.Int8(), bigops.Sparse(0.5) + bigops.Int8()], ids=str)
def test_once_for_all_readers(normed: bool, again: bool, config: object) -> None:
    torch.manual_seed(0)
    module, x = Gate(normed, again).eval(), torch.randn(5, 3, 64)
    bigops.compress_(module, config)
    graph = graph_of(module, x)
    with torch.no_grad():
        plain = graph(x)
        norm.run(graph)
        assert quantize_once.run(graph) == 1
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        found = calls(graph)
        assert found["norm_act_quant" if normed else "act_quant"] == 1
        assert found["norm"] == 0
        assert found["quantized_linear_rows"] + found["sparse_linear_rows"] == 2
        for was, now in zip(plain, graph(x), strict=True):
            # the same u8 of a norm that was rounded a step otherwise
            assert torch.equal(was, now) or tolerance.snr_db(now, was) > 60


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def test_readers_that_quantise_otherwise_stay() -> None:
    module, x = Mixed().eval(), torch.randn(5, 64)
    symmetric = bigops.Int8(activations="symmetric")
    bigops.compress_(module, {"a": bigops.Int8(), "b": symmetric, "c": bigops.Int4()})
    graph = graph_of(module, x)
    assert quantize_once.run(graph) == 0
