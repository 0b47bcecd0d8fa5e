"""What a sharding rule is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

# Placements of the results and of the arguments; None for whatever is no tensor.
Rule: TypeAlias = "tuple[list[Placement | None], list[Placement | None]]"


def _if(tensor: Any, placement: Placement) -> Placement | None:
    return None if tensor is None else placement


Weight: TypeAlias = "Callable[[bool], list[Placement | None]]"
"""Placements of all arguments that make a stored weight: whole, or its rows split."""


def stored_linear(x: Any, weight: Weight, splits: bool, bias: Any, residual: Any) -> list[Rule]:
    """Rules of a linear op with a stored weight: rows of x are split, or where ``splits`` those of
    the weight.
    """
    from torch.distributed.tensor import Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(y: Any, x_: Any, split: bool = False) -> Rule:
        row = Shard(0) if split else whole
        return [y], [x_, *weight(split), _if(bias, row), _if(residual, y), None]

    rules = [rule(whole, whole), *(rule(Shard(d), Shard(d)) for d in range(last))]
    return [*rules, rule(Shard(last), whole, True)] if splits else rules


def stored_linear_backward(
    x: Any, weight: Weight, splits: bool, bias: Any, need_x: bool, need_bias: bool
) -> list[Rule]:
    """Rules of the backward of `stored_linear`, which gives the gradients of x and bias."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(gx: Any, gb: Any, grad: Any, x_: Any, split: bool = False) -> Rule:
        # An unneeded gradient is an empty tensor, which cannot be split.
        results = [gx if need_x else whole, gb if need_bias else whole]
        row = Shard(0) if split else whole
        return results, [grad, x_, *weight(split), _if(bias, row), None, None, None]

    rules = [rule(whole, whole, whole, whole)]
    rules += [rule(Shard(d), Partial(), Shard(d), Shard(d)) for d in range(last)]
    return [*rules, rule(Partial(), Shard(0), Shard(last), whole, True)] if splits else rules
