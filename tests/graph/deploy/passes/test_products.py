"""Linear layers: packed, merged, with what follows in their epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.graph.deploy.passes import epilogue, products, rows, siblings
from tests.graph.deploy.passes.exported import rewritten

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


class Block(nn.Module):
    """act(linear(x)) + residual, either way round."""

    def __init__(self, activation: nn.Module, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96) if linear is None else linear
        self.back = nn.Linear(96, 64)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.activation(self.linear(x)))


def _ready(graph: object) -> int:
    return products.pack(graph) + products.fuse(graph) + epilogue.run(graph)  # type: ignore


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_residual_move_into_the_products(name: str) -> None:
    found = rewritten(_ready, Block(ACTIVATIONS[name]), torch.randn(5, 3, 64))
    assert found.before["linear"] == 2
    assert set(found.after) == {"packed_linear"}
    assert found.after["packed_linear"] == 2


@pytest.mark.parametrize("config", [bigops.Int8(), bigops.Sparse(0.5) + bigops.Int8()])
def test_compressed_products_take_them_too(config: object) -> None:
    module = Block(nn.GELU())
    bigops.compress_(module, config)
    from tests.graph.deploy.passes.exported import calls, graph_of

    graph = graph_of(module, torch.randn(5, 3, 64))
    plain = graph(torch.ones(4, 3, 64))
    assert epilogue.run(graph) == 2
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert len(calls(graph)) == 1
    error = (graph(torch.ones(4, 3, 64)) - plain).abs().max()
    assert error <= 1e-6 * plain.abs().max()  # the same sums, another place of the rounding


class Read(nn.Module):
    """What is read a second time, or has another shape, stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.a(x)
        second = self.b(x) + x[:1]  # a broadcast
        return torch.relu(first) + first, second


def test_what_is_read_twice_or_broadcast_stays() -> None:
    found = rewritten(_ready, Read(), torch.randn(5, 3, 64))
    assert found.after["relu"] == 1
    assert found.after["add"] == 2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x)


def test_a_small_layer_without_an_epilogue_stays() -> None:
    found = rewritten(_ready, Small(), torch.randn(5, 8))
    assert found.after == found.before == {"linear": 1}


class Attention(nn.Module):
    """q, k, v of other widths, viewed by heads; a fourth reader that is not."""

    def __init__(self, kv: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, kv), nn.Linear(64, kv)
        self.other = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, -1, 16).transpose(1, 2) for m in (self.q, self.k, self.v))
        return q, k, v, torch.relu(self.other(x))


def test_siblings_become_one_product_and_one_with_an_activation_stays() -> None:
    found = rewritten(siblings.run, Attention(), torch.randn(5, 3, 64))
    assert found.count == 1
    assert found.before["linear"] == 4
    assert found.after["linear"] == 2


@pytest.mark.parametrize("config", [bigops.Int8(), bigops.Sparse(0.5) + bigops.Int8()], ids=str)
def test_compressed_siblings_are_merged_in_their_format(config: Any) -> None:
    module = Attention(64)  # a whole chunk of a sparse weight
    bigops.compress_(module, config)
    from tests.graph.deploy.passes.exported import calls, graph_of

    x = torch.randn(5, 3, 64)
    graph = graph_of(module, x)
    plain = graph(x)
    assert siblings.run(graph) == 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    found = calls(graph)
    assert found["quantized_linear"] + found["sparse_linear"] == 2
    for was, now in zip(plain, graph(x), strict=True):
        assert torch.equal(was, now)  # the same kernel, the same rows


class Conv1D(nn.Module):
    """A linear layer with a weight [K, N] on flattened rows, as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 96) / 8)
        self.bias = nn.Parameter(torch.randn(96))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, 64), self.weight)
        return nn.functional.gelu(rows.view(*x.shape[:-1], 96))


def test_addmm_on_flattened_rows_is_a_linear_layer() -> None:
    def run(graph: object) -> int:
        return rows.run(graph) + _ready(graph)  # type: ignore[arg-type]

    found = rewritten(run, Conv1D(), torch.randn(5, 3, 64))
    assert set(found.after) == {"packed_linear"}
