"""Sharding rules of fp8_linear; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

from typing import Any

from bigops.formats.fp8 import BLOCK
from bigops.parallel._rule import Rule, Weight, _if, stored_linear, stored_linear_backward


def _splits(values: Any, scales: str) -> bool:
    """Whether N splits: in blocks, whole blocks of 128 rows are a weight by themselves."""
    return scales != "block" or values.shape[0] % (BLOCK * values.mesh.size()) == 0


def _weight(x_scale: Any, scales: str) -> Weight:
    """Placements of the storage and of its three plain arguments."""
    from torch.distributed.tensor import Replicate, Shard

    def placed(split: bool) -> list[Any]:
        whole = Replicate()
        row = Shard(0) if split else whole
        return [row, whole if scales == "tensor" else row, _if(x_scale, whole), None, None, None]

    return placed


def fp8_linear(
    x: Any,
    values: Any,
    scale: Any,
    x_scale: Any,
    k: int,
    scales: str,
    activations: str,
    bias: Any,
    residual: Any,
    activation: str,
) -> list[Rule]:
    splits = _splits(values, scales)
    return stored_linear(x, _weight(x_scale, scales), splits, bias, residual)


def fp8_linear_backward(
    grad: Any,
    x: Any,
    values: Any,
    scale: Any,
    x_scale: Any,
    k: int,
    scales: str,
    activations: str,
    bias: Any,
    activation: str,
    need_x: bool,
    need_bias: bool,
) -> list[Rule]:
    splits = _splits(values, scales)
    return stored_linear_backward(x, _weight(x_scale, scales), splits, bias, need_x, need_bias)
