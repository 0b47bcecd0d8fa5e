"""Sharding rules of fused_linear; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

from typing import Any

from bigops.ops.activation import GATED
from bigops.ops.sharding import Rule, if_given


def fused_linear(
    x: Any, weight: Any, bias: Any, residual: Any, activation: str, parts: bool = False
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1

    def rule(y: Any, x_: Any, weight_: Any, bias_: Any, residual_: Any) -> Rule:
        given = (if_given(bias, bias_), if_given(residual, residual_))
        results = [y, whole if activation == "none" else y] if parts else [y]
        return results, [x_, weight_, *given, None]

    whole = Replicate()  # also of z where there is no activation: an empty tensor
    rules = [rule(whole, whole, whole, whole, whole)]
    rules += [rule(Shard(d), Shard(d), whole, whole, Shard(d)) for d in range(last)]
    if activation not in GATED:
        rules.append(rule(Shard(last), whole, Shard(0), Shard(0), Shard(last)))
    if activation == "none":
        # What is added once must be added on one rank only: Partial splits it up.
        rules.append(rule(Partial(), Shard(last), Shard(1), Partial(), Partial()))
    return rules


def fused_linear_with_parts(
    x: Any, weight: Any, bias: Any, residual: Any, activation: str
) -> list[Rule]:
    return fused_linear(x, weight, bias, residual, activation, parts=True)


def fused_linear_backward(
    grad: Any,
    x: Any,
    weight: Any,
    preact: Any,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(gx: Any, gw: Any, gb: Any, grad_: Any, x_: Any, weight_: Any) -> Rule:
        # An unneeded gradient is an empty tensor, which cannot be split.
        needed = zip((need_x, need_weight, need_bias), (gx, gw, gb), strict=True)
        results = [placement if need else whole for need, placement in needed]
        preact_ = whole if activation == "none" else grad_
        return results, [grad_, x_, weight_, if_given(preact, preact_), None, None, None, None]

    rules = [rule(whole, whole, whole, whole, whole, whole)]
    for d in range(last):
        rules.append(rule(Shard(d), Partial(), Partial(), Shard(d), Shard(d), whole))
    if activation not in GATED:
        rules.append(rule(Partial(), Shard(0), Shard(0), Shard(last), whole, Shard(0)))
    rules.append(rule(Shard(last), Shard(1), whole, whole, Shard(last), Shard(1)))
    return rules
