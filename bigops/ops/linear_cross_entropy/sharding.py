"""Sharding rules of linear_cross_entropy; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigops.ops.linear_cross_entropy.schema import Problem
from bigops.ops.sharding import Rule, if_given


def linear_cross_entropy(*args: Any) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate

    given = Problem(*args)
    rules: list[Rule] = [([Replicate()], _loss_arguments(Replicate(), given))]
    for token in _tokens(given):
        loss = token if given.reduction == "none" else Partial()
        rules.append(([loss], _loss_arguments(token, given)))
    return rules


def linear_cross_entropy_with_grad(*args: Any) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate

    *problem, need_x, need_weight, need_bias, stats = args
    given, needs = Problem(*problem), (need_x, need_weight, need_bias)
    whole, flags = Replicate(), [None] * 4
    rules: list[Rule] = [([whole] * 7, [*_loss_arguments(whole, given), *flags])]
    for token in _tokens(given):
        loss = token if given.reduction == "none" else Partial()
        grads = _loss_gradients(token, needs)
        statistics = [token if stats else whole] * 2
        made = [loss, *grads, whole, *statistics]  # the factor is the same on all
        rules.append((made, [*_loss_arguments(token, given), *flags]))
    return rules


def linear_cross_entropy_backward(grad: Any, *args: Any) -> list[Rule]:
    from torch.distributed.tensor import Replicate

    *problem, need_x, need_weight, need_bias = args
    given, needs = Problem(*problem), (need_x, need_weight, need_bias)
    whole, flags = Replicate(), [None] * 3
    rules: list[Rule] = [([whole] * 3, [whole, *_loss_arguments(whole, given), *flags])]
    for token in _tokens(given):
        incoming = token if given.reduction == "none" else whole
        arguments = [incoming, *_loss_arguments(token, given), *flags]
        rules.append((_loss_gradients(token, needs), arguments))
    return rules


def _tokens(given: Any) -> list[Any]:
    """Placements of x [.., K] by tokens that give each rank a loss of its own."""
    from torch.distributed.tensor import Shard

    return [] if given.reduction == "mean" else [Shard(d) for d in range(given.x.ndim - 1)]


def _loss_arguments(token: Any, given: Any) -> list[Any]:
    """Placements of a problem's arguments: of what has tokens, of the rest, None of options."""
    from torch.distributed.tensor import Replicate

    tokens, heads = ("x", "target", "teacher_x"), ("weight", "bias", "class_weight")
    places = dict.fromkeys(tokens, token) | dict.fromkeys(heads, Replicate())
    places |= dict.fromkeys(("teacher_weight", "teacher_bias"), Replicate())
    named = given._asdict().items()
    return [if_given(value, places[name]) if name in places else None for name, value in named]


def _loss_gradients(token: Any, needs: Sequence[bool]) -> list[Any]:
    """Placements of the gradients of x, weight and bias; one that is not needed is empty."""
    from torch.distributed.tensor import Partial, Replicate

    made = (token, Partial(), Partial())
    return [g if need else Replicate() for g, need in zip(made, needs, strict=True)]
