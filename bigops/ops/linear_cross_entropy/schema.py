"""The ops of `linear_cross_entropy`: schemas, what serves them, fakes.

Products and loop are the same on every device; only the pass over a chunk has kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    counted,
    reduced,
    serve_chunk,
    serve_divergence,
)

# With a teacher the target only says which tokens count; beta 0 is its Kullback-Leibler divergence.
_ARGS = (
    "Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
    "Tensor? teacher_x, Tensor? teacher_weight, Tensor? teacher_bias, str reduction, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap, float temperature, "
    "float beta"
)
_NEEDS = "bool need_x, bool need_weight, bool need_bias"
Statistics = tuple[Tensor, Tensor]
"""logsumexp and prediction of each token."""


def _run(
    problem: Any, needs: chunked.Needs, grad: Tensor | None = None, stats: bool = False
) -> tuple[Tensor, chunked.Grads, Tensor, Statistics]:
    """Losses [M], gradients, the factor (0-dim) that the gradients still lack, and statistics
    (empty without ``stats``).

    With ``grad`` they are the gradients for that incoming gradient, and the factor is 1.
    """
    check(problem)
    x, weight, target, class_weight = (
        problem.x,
        problem.weight,
        problem.target,
        problem.class_weight,
    )
    wide = accumulation(x.dtype)
    if target.is_floating_point():
        y = rows(target)
    else:
        check_range(target, weight.shape[0], problem.ignore_index)
        y = target.reshape(-1).contiguous()
    m = y.shape[0]
    if class_weight is not None:
        class_weight = class_weight.detach().to(wide)
    factor, scale = 1.0, 1.0
    if problem.reduction == "mean" and any(needs):
        denominator = float(counted(y, class_weight, problem.ignore_index, wide).sum())
        inverse = 1 / denominator if denominator else math.inf
        # Gradients of the mean of many tokens are subnormal in fp16: they are divided at the end.
        if grad is None and denominator and x.dtype == torch.float16:
            factor = inverse
        else:
            scale = inverse
    factors: Tensor | float = scale
    if grad is not None:
        factors = (grad.reshape(-1).to(wide) * scale).expand(m).contiguous()
    lse = x.new_empty(m if stats else 0, dtype=wide)
    predictions = x.new_empty(m if stats else 0, dtype=torch.int64)
    weight_sum = float(weight.shape[0] if class_weight is None else class_weight.sum())
    options = (
        weight_sum,
        problem.ignore_index,
        problem.label_smoothing,
        problem.z_loss,
        problem.softcap,
    )
    serve = serve_chunk if target.is_floating_point() else chunk_op

    def one_pass(logits: Tensor, part: slice, scale: Tensor | None, gradient: bool) -> Tensor:
        losses, of_lse, of_predictions = serve(
            logits, y[part], problem.bias, class_weight, scale, *options, gradient, stats
        )
        if stats:
            lse[part], predictions[part] = of_lse, of_predictions
        return losses  # type: ignore[no-any-return]

    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        used: chunked.Pass = one_pass
        if problem.teacher_x is not None:
            used = _from_teacher(problem, y)
        elif target.is_floating_point():
            used = chunked.in_rows(one_pass)
        losses, (gx, gw, gb) = chunked.run(rows(x), weight, used, factors, needs)
    gx = None if gx is None else gx.view(x.shape)
    factor_of = torch.full((), factor, dtype=wide, device=x.device)
    tokens = x.shape[:-1] if stats else (0,)
    return losses, (gx, gw, gb), factor_of, (lse.view(tokens), predictions.view(tokens))


def _from_teacher(problem: Any, y: Tensor) -> chunked.Pass:
    """The pass over a chunk beside the teacher's logits of the same tokens."""
    x, weight = rows(problem.teacher_x).contiguous(), problem.teacher_weight.contiguous()
    m, v = x.shape[0], weight.shape[0]
    # As many rows as the student's chunks have, which are cut up by its own dtype.
    size = min(m, chunked.chunk_rows(m, v, problem.x.element_size()))
    products, buffer = chunked.Products(x, weight, size), x.new_empty(size, v)
    kept = y != problem.ignore_index

    def one_pass(logits: Tensor, part: slice, scale: Tensor | None, gradient: bool) -> Tensor:
        teacher = buffer[: part.stop - part.start]
        products.logits(x[part], teacher)

        def of_rows(logits: Tensor, own: slice, scale: Tensor | None, gradient: bool) -> Tensor:
            return serve_divergence(
                logits,
                teacher[own.start - part.start : own.stop - part.start],
                kept[own],
                problem.bias,
                problem.teacher_bias,
                scale,
                problem.temperature,
                problem.beta,
                gradient,
            )

        return chunked.in_rows(of_rows)(logits, part, scale, gradient)

    return one_pass


def _loss(losses: Tensor, problem: Any) -> Tensor:
    losses = losses.view(problem.x.shape[:-1])
    return reduced(
        losses, problem.target, problem.class_weight, problem.reduction, problem.ignore_index
    )


def _split(args: Sequence[Any]) -> tuple[Any, chunked.Needs]:
    *problem, need_x, need_weight, need_bias = args
    return Problem(*problem), (need_x, need_weight, need_bias)


def _shape(problem: Any) -> tuple[int, ...]:
    return problem.x.shape[:-1] if problem.reduction == "none" else ()


def _or_empty(x: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _serve(*args: Any) -> Tensor:
    problem = Problem(*args)
    losses, *_ = _run(problem, (False, False, False))
    return _loss(losses, problem)


def _serve_with_grad(*args: Any) -> tuple[Tensor, ...]:
    *given, stats = args
    problem, needs = _split(given)
    if problem.reduction == "none" and any(needs):
        raise ValueError("reduction: expected mean or sum, whose gradient is one number; got none")
    losses, grads, factor, statistics = _run(problem, needs, stats=stats)
    return _loss(losses, problem), *_or_empty(problem.x, *grads), factor, *statistics


def _serve_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    problem, needs = _split(args)
    checks.shape("grad", grad, _shape(problem))
    _, (gx, gw, gb), *_ = _run(problem, needs, grad)
    x = problem.x
    return _or_empty(x, gx, *(None if g is None else g.to(x.dtype) for g in (gw, gb)))


chunk_op = define(
    "linear_cross_entropy_chunk(Tensor(a!) logits, Tensor target, Tensor? bias, "
    "Tensor? class_weight, Tensor? scale, float class_weight_sum, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool gradient, bool predict) "
    "-> (Tensor, Tensor, Tensor)",
    serve_chunk,
)
forward_op = define(f"linear_cross_entropy({_ARGS}) -> Tensor", _serve)
with_grad_op = define(
    f"linear_cross_entropy_with_grad({_ARGS}, {_NEEDS}, bool stats) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _serve_with_grad,
)
backward_op = define(
    f"linear_cross_entropy_backward(Tensor grad, {_ARGS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    _serve_backward,
)
Problem: Any = arguments(forward_op)
"""The arguments of the op by name; the reduction is a word in what serves, else its code."""


def fake_chunk(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    m, wide = logits.shape[0], accumulation(logits.dtype)
    *_, predict = args
    predicted = m if predict else 0
    losses, lse = (logits.new_empty(m, dtype=wide) for _ in range(2))
    return losses, lse, logits.new_empty(predicted, dtype=torch.int64)


def fake(*args: Any) -> Tensor:
    problem = Problem(*args)
    check(problem)
    x = problem.x
    return x.new_empty(_shape(problem), dtype=accumulation(x.dtype))  # type: ignore[no-any-return]


def fake_with_grad(*args: Any) -> tuple[Tensor, ...]:
    *given, stats = args
    problem, needs = _split(given)
    x, wide = problem.x, accumulation(problem.x.dtype)
    grads = _fake_grads(problem, needs, wide)
    factor = x.new_empty((), dtype=wide)
    tokens = x.shape[:-1] if stats else (0,)
    statistics = (x.new_empty(tokens, dtype=dtype) for dtype in (wide, torch.int64))
    return fake(*problem), *grads, factor, *statistics


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
