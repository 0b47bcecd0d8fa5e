"""The ops of `linear_cross_entropy`: schemas, what serves them, fakes.

Products and loop are the same on every device; only the pass over a chunk has kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.formats.base import rows
from bigops.ops.library import arguments, define
from bigops.ops.linear_cross_entropy import chunked
from bigops.ops.linear_cross_entropy.check import check, check_range
from bigops.ops.linear_cross_entropy.reference import (
    accumulation,
    own_weight,
    reduced,
    serve_chunk,
)

_ARGS = (
    "Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, str reduction, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap"
)
_NEEDS = "bool need_x, bool need_weight, bool need_bias"


def _run(
    problem: Any, needs: chunked.Needs, grad: Tensor | None = None
) -> tuple[Tensor, chunked.Grads, Tensor]:
    """Losses [M], gradients, and the factor (0-dim) that the gradients still lack.

    With ``grad`` they are the gradients for that incoming gradient, and the factor is 1.
    """
    x, weight, target, bias, class_weight, reduction, ignore_index, *numbers = problem
    check(problem)
    check_range(target, weight.shape[0], ignore_index)
    wide = accumulation(x.dtype)
    y = target.reshape(-1).contiguous()
    if class_weight is not None:
        class_weight = class_weight.detach().to(wide)
    factor, scale = 1.0, 1.0
    if reduction == "mean" and any(needs):
        denominator = float(own_weight(y, class_weight, ignore_index, wide).sum())
        inverse = 1 / denominator if denominator else math.inf
        # Gradients of the mean of many tokens are subnormal in fp16: they are divided at the end.
        if grad is None and denominator and x.dtype == torch.float16:
            factor = inverse
        else:
            scale = inverse
    factors: Tensor | float = scale
    if grad is not None:
        factors = (grad.reshape(-1).to(wide) * scale).expand(y.shape[0]).contiguous()
    weight_sum = float(weight.shape[0] if class_weight is None else class_weight.sum())

    def one_pass(logits: Tensor, y: Tensor, scale: Tensor | None, gradient: bool) -> Tensor:
        return chunk_op(  # type: ignore[no-any-return]
            logits, y, bias, class_weight, scale, weight_sum, ignore_index, *numbers, gradient
        )

    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        losses, (gx, gw, gb) = chunked.run(rows(x), weight, y, one_pass, factors, needs)
    gx = None if gx is None else gx.view(x.shape)
    return losses, (gx, gw, gb), torch.full((), factor, dtype=wide, device=x.device)


def _loss(losses: Tensor, problem: Any) -> Tensor:
    losses = losses.view(problem.target.shape)
    return reduced(
        losses, problem.target, problem.class_weight, problem.reduction, problem.ignore_index
    )


def _split(args: tuple[Any, ...]) -> tuple[Any, chunked.Needs]:
    *problem, need_x, need_weight, need_bias = args
    return Problem(*problem), (need_x, need_weight, need_bias)


def _shape(problem: Any) -> tuple[int, ...]:
    return problem.target.shape if problem.reduction == "none" else ()


def _or_empty(x: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _serve(*args: Any) -> Tensor:
    problem = Problem(*args)
    losses, _, _ = _run(problem, (False, False, False))
    return _loss(losses, problem)


def _serve_with_grad(*args: Any) -> tuple[Tensor, ...]:
    problem, needs = _split(args)
    if problem.reduction == "none":
        raise ValueError("reduction: expected mean or sum, whose gradient is one number; got none")
    losses, grads, factor = _run(problem, needs)
    return _loss(losses, problem), *_or_empty(problem.x, *grads), factor


def _serve_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, needs = _split(args)
    checks.shape("grad", grad, _shape(problem))
    _, (gx, gw, gb), _ = _run(problem, needs, grad)
    x = problem.x
    return _or_empty(x, gx, *(None if g is None else g.to(x.dtype) for g in (gw, gb)))


chunk_op = define(
    "linear_cross_entropy_chunk(Tensor(a!) logits, Tensor target, Tensor? bias, "
    "Tensor? class_weight, Tensor? scale, float class_weight_sum, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool gradient) -> Tensor",
    serve_chunk,
)
forward_op = define(f"linear_cross_entropy({_ARGS}) -> Tensor", _serve)
with_grad_op = define(
    f"linear_cross_entropy_with_grad({_ARGS}, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _serve_with_grad,
)
backward_op = define(
    f"linear_cross_entropy_backward(Tensor grad, {_ARGS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    _serve_backward,
)
Problem: Any = arguments(forward_op)
"""The arguments of the op by name; the reduction is a word in what serves, else its code."""


def fake_chunk(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=accumulation(logits.dtype))


def fake(*args: Any) -> Tensor:
    problem = Problem(*args)
    check(problem)
    x = problem.x
    return x.new_empty(_shape(problem), dtype=accumulation(x.dtype))  # type: ignore[no-any-return]


def fake_with_grad(*args: Any) -> tuple[Tensor, ...]:
    problem, needs = _split(args)
    grads = _fake_grads(problem, needs, accumulation(problem.x.dtype))
    return fake(*problem), *grads, fake(*problem)


def fake_backward(_: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, needs = _split(args)
    return _fake_grads(problem, needs, problem.x.dtype)


def _fake_grads(problem: Any, needs: chunked.Needs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = problem.x, problem.weight
    kinds = (x.shape, x.dtype), (weight.shape, dtype), (weight.shape[:1], dtype)
    return tuple(
        x.new_empty(shape, dtype=dtype) if need else x.new_empty(0)
        for need, (shape, dtype) in zip(needs, kinds, strict=True)
    )
