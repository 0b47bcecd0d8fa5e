"""Sharding rules of linear_cross_entropy; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

from typing import Any

from bigops.ops.sharding import Rule, if_given


def linear_cross_entropy(
    x: Any,
    weight: Any,
    target: Any,
    bias: Any,
    class_weight: Any,
    reduction: str,
    *options: Any,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate

    whole = Replicate()
    rules: list[Rule] = [([whole], _loss_arguments(whole, bias, class_weight))]
    for token in _tokens(x, reduction):
        loss = token if reduction == "none" else Partial()
        rules.append(([loss], _loss_arguments(token, bias, class_weight)))
    return rules


def linear_cross_entropy_with_grad(
    x: Any, weight: Any, target: Any, bias: Any, class_weight: Any, reduction: str, *rest: Any
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate

    _, _, _, _, *needs = rest  # numbers come first
    whole, nothing = Replicate(), [None] * 3
    rules: list[Rule] = [([whole] * 5, [*_loss_arguments(whole, bias, class_weight), *nothing])]
    for token in _tokens(x, reduction):
        grads = _loss_gradients(token, needs)
        given = [*_loss_arguments(token, bias, class_weight), *nothing]
        rules.append(([Partial(), *grads, whole], given))  # the last is the same factor on all
    return rules


def linear_cross_entropy_backward(
    grad: Any,
    x: Any,
    weight: Any,
    target: Any,
    bias: Any,
    class_weight: Any,
    reduction: str,
    *rest: Any,
) -> list[Rule]:
    from torch.distributed.tensor import Replicate

    _, _, _, _, *needs = rest  # numbers come first
    whole, nothing = Replicate(), [None] * 3
    given = [*_loss_arguments(whole, bias, class_weight), *nothing]
    rules: list[Rule] = [([whole] * 3, [whole, *given])]
    for token in _tokens(x, reduction):
        given = [*_loss_arguments(token, bias, class_weight), *nothing]
        incoming = token if reduction == "none" else whole
        rules.append((_loss_gradients(token, needs), [incoming, *given]))
    return rules


def _tokens(x: Any, reduction: str) -> list[Any]:
    """Placements of x [.., K] by tokens that give each rank a loss of its own."""
    from torch.distributed.tensor import Shard

    return [] if reduction == "mean" else [Shard(d) for d in range(x.ndim - 1)]


def _loss_arguments(token: Any, bias: Any, class_weight: Any) -> list[Any]:
    """Placements of x, weight, target, bias, class_weight and of the five options."""
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    return [token, whole, token, if_given(bias, whole), if_given(class_weight, whole), *[None] * 5]


def _loss_gradients(token: Any, needs: list[bool]) -> list[Any]:
    """Placements of the gradients of x, weight and bias; one that is not needed is empty."""
    from torch.distributed.tensor import Partial, Replicate

    made = (token, Partial(), Partial())
    return [g if need else Replicate() for g, need in zip(made, needs, strict=True)]
