"""The layers of the table of `contract`, by name, and their meaning in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigops
from bigops.nn import (
    GatedMLP,
    Linear,
    LinearCrossEntropy,
    LoRALinear,
    LowRankLinear,
    QLoRALinear,
    QuantLinear,
    QuantLowRankLinear,
    SparseLinear,
)
from tests.nn.stored_cases import LAYERS as STORED
from tests.nn.stored_cases import K, N


class WithTarget(LinearCrossEntropy):
    """The loss with its targets, so that it is called as the others are."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        rows = input.reshape(-1, input.shape[-1])
        return super().forward(rows, rows.new_zeros(rows.shape[0], dtype=torch.long))


def _adapted(layer: Any) -> Any:
    with torch.no_grad():
        layer.adapters["default"].b.normal_(std=0.1)
    return layer


LAYERS: dict[str, Callable[[], Any]] = {
    "Linear": lambda: Linear(K, N),
    "Linear gelu": lambda: Linear(K, N, activation="gelu"),
    "LowRankLinear": lambda: LowRankLinear(K, N, 16),
    "LoRALinear": lambda: _adapted(LoRALinear.from_linear(Linear(K, N), 4)),
    "QLoRALinear": lambda: _adapted(QLoRALinear.from_linear(QuantLinear(K, N).freeze(), 4)),
    "GatedMLP": lambda: GatedMLP(K, 96, N),
    "LinearCrossEntropy": lambda: WithTarget(K, N),
    "int8 recovery": lambda: QuantLinear(K, N),
    "sparse recovery": lambda: SparseLinear(K, N, values="fp32"),
    "factors recovery": lambda: QuantLowRankLinear(K, N, 16),
    **STORED,
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[name]()


def x_of(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(lead or (6,)), K, dtype=torch.float32, generator=generator).to(dtype)


def near(got: Tensor, want: Tensor, loose: float = 1e-4) -> None:
    """Within ``loose`` of the largest number; the dtype and the shape are the same."""
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    scale = float(want.abs().max()) if want.numel() else 1.0
    assert scale > 0
    assert float((got - want).abs().max()) <= loose * scale


def call(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)  # type: ignore[no-any-return]


def dense_of(name: str, layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer as torch would write it, differentiable for x, of any dtype: its meaning."""
    if isinstance(layer, GatedMLP | bigops.nn.PackedGatedMLP):
        plain: Any = layer.unpacked() if hasattr(layer, "unpacked") else layer

        def gated(x: Tensor) -> Tensor:
            w, b = plain.gate_up_weight.to(x), plain.gate_up_bias
            gate, up = F.linear(x, w, None if b is None else b.to(x)).chunk(2, -1)
            down = plain.down_proj
            bias = None if down.bias is None else down.bias.to(x)
            return F.linear(F.silu(gate) * up, down.weight.to(x), bias)

        return gated
    weight = layer.weight.detach().clone().double()
    if name in ("int8 recovery", "sparse recovery"):
        weight = layer.trained_weight().detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()

    def plain_linear(x: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x), None if bias is None else bias.to(x))
        if isinstance(layer, WithTarget):
            return F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long))
        return F.gelu(y) if getattr(layer, "activation", "none") == "gelu" else y

    return plain_linear
