"""Sharding rules of fp8_linear; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

from typing import Any

from bigops.ops._fp8_weight import BLOCK
from bigops.parallel._rule import Rule, _if


def _splits(values: Any, scales: str) -> bool:
    """Whether N splits: in blocks, whole blocks of 128 rows are a weight by themselves."""
    return scales != "block" or values.shape[0] % (BLOCK * values.mesh.size()) == 0


def _weight(row: Any, x_scale: Any, scales: str) -> list[Any]:
    """Placements of the storage and of its three plain arguments."""
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    return [row, whole if scales == "tensor" else row, _if(x_scale, whole), None, None, None]


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
    from torch.distributed.tensor import Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(y: Any, x_: Any, row: Any) -> Rule:
        return [y], [x_, *_weight(row, x_scale, scales), _if(bias, row), _if(residual, y), None]

    rules = [rule(whole, whole, whole)]
    rules += [rule(Shard(d), Shard(d), whole) for d in range(last)]
    if _splits(values, scales):
        rules.append(rule(Shard(last), whole, Shard(0)))
    return rules


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
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(gx: Any, gb: Any, grad_: Any, x_: Any, row: Any) -> Rule:
        results = [gx if need_x else whole, gb if need_bias else whole]
        weight = _weight(row, x_scale, scales)
        return results, [grad_, x_, *weight, _if(bias, row), None, None, None]

    rules = [rule(whole, whole, whole, whole, whole)]
    rules += [rule(Shard(d), Partial(), Shard(d), Shard(d), whole) for d in range(last)]
    if _splits(values, scales):
        rules.append(rule(Partial(), Shard(0), Shard(last), whole, Shard(0)))
    return rules
