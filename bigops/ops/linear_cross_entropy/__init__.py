"""linear_cross_entropy: a classifier and its loss, the logits never held as a whole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.ops.library import autocast, encoder
from bigops.ops.linear_cross_entropy import choose as choose  # registers what serves
from bigops.ops.linear_cross_entropy.autograd import call, traced
from bigops.ops.linear_cross_entropy.check import check, check_options, check_teacher_options
from bigops.ops.linear_cross_entropy.reference import counted, own_weight, reduced, reference
from bigops.ops.linear_cross_entropy.schema import Problem, forward_op

__all__ = [
    "CrossEntropyStats",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "reference",
]
_encoded = encoder(forward_op)
_words = forward_op._overloadpacket.default
_NO_TEACHER = (None, None, None)


class CrossEntropyStats(NamedTuple):
    """What `linear_cross_entropy` gives with ``return_stats``; only the loss has a gradient."""

    loss: Tensor
    """What the call gives without statistics, its z-loss included."""
    z_loss: Tensor
    """The part of the loss that ``z_loss`` adds, in the loss's shape; 0 without."""
    accuracy: Tensor
    """0-dim, in the loss's dtype: the share of the tokens that count whose prediction is the target
    (of class probabilities the most probable class); nan where none counts."""
    predictions: Tensor
    """``[..]`` int64, of every token: the first of the largest logits, as `torch.argmax` gives."""


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    class_weight: Tensor | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    class_weight: Tensor | None = ...,
    return_stats: Literal[True],
) -> CrossEntropyStats: ...


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | CrossEntropyStats:
    """Cross entropy of ``x @ weight.T + bias`` against ``target``, without holding the logits.

    The result is that of `torch.nn.functional.linear` and `cross_entropy`. Logits exist for an
    eighth of the tokens at a time. With reduction "mean" and "sum" the gradients are made in the
    forward pass (three products) and scaled in the backward pass; with "none" their incoming
    gradient is one number a token, so that the backward pass computes the logits again (four
    products), as it does under torch.func. In forward mode (torch.func.jvp, hessian) the logits are
    held as a whole.

    Args:
        x: ``[.., K]``; float32, bfloat16, float16 or float64, any strides.
        weight: ``[V, K]``. Where it is frozen (`requires_grad` False) its gradient is not made.
        target: ``[..]`` int64, each a class ``0 <= target < V`` or ``ignore_index``; or
            ``[.., V]`` floating, class probabilities, of which no token is ignored and the mean is
            over all tokens. They are a constant, and plain torch serves them.
        bias: ``[V]``, or None.
        ignore_index: target of tokens that count for nothing: loss and gradient are exactly 0. With
            class probabilities it has to be below 0, as in torch.
        reduction: "mean" (over the tokens that count; by class weight where there is one; nan
            where none counts, as in torch), "sum" or "none".
        label_smoothing: part of the target's mass that is spread over all classes, 0 to 1
            (arXiv 1512.00567).
        z_loss: factor of ``logsumexp(logits)^2``, added to each token's loss (arXiv 2204.02311),
            by the class weight of its target (the mean of them by class probabilities).
        softcap: c in ``c tanh(logits / c)`` before the loss (arXiv 2408.00118), or None.
        class_weight: ``[V]`` floating, a constant: it gets no gradient.
        return_stats: give a `CrossEntropyStats` with z-loss, accuracy and predictions, which come
            of the same chunks of logits.

    Returns:
        A number, or ``[..]`` for "none"; with ``return_stats`` a `CrossEntropyStats`. float32 for
        bf16 and fp16 (as torch gives under autocast), whose logits are stored in x's dtype. Under
        `torch.autocast` x, weight and bias are cast to the autocast dtype first.

    Raises:
        ValueError: shapes, devices or numbers that do not fit, or a target out of range.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: in double backward, which is not implemented.
    """
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap or 0.0, 1.0, 0.0)
    if not isinstance(x, Tensor) and torch.overrides.has_torch_function_unary(x):  # of torch.fx
        return _words(x, weight, target, bias, class_weight, *_NO_TEACHER, *options)  # type: ignore[no-any-return]
    checks.tensor("target", target)
    checks.tensors(x=x, weight=weight, target=target, bias=bias, class_weight=class_weight)
    check_options(reduction, ignore_index, label_smoothing, z_loss, softcap)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast(x.device.type, x, weight, bias)  # type: ignore[assignment]
    # as `options` is, its numbers floats
    numbers = (float(label_smoothing), float(z_loss), softcap or 0.0, 1.0, 0.0)
    problem = Problem(
        x, weight, target, bias, class_weight, *_NO_TEACHER, reduction, ignore_index, *numbers
    )
    if return_stats and weight.dim() == 2 and weight.shape[0] == 0:
        raise ValueError("weight: expected at least one class, for its predictions; got none")
    found = _checked(problem, return_stats)
    return _statistics(problem, *found) if return_stats else found  # type: ignore[no-any-return]


def _checked(problem: Any, stats: bool = False) -> Any:
    """The loss; with ``stats`` (loss, logsumexp, predictions)."""
    check(problem)
    args = _encoded(problem)
    return traced(*args, stats=stats) if torch.compiler.is_compiling() else call(*args, stats=stats)


def _statistics(problem: Any, loss: Tensor, lse: Tensor, predictions: Tensor) -> CrossEntropyStats:
    target, class_weight, ignored = problem.target, problem.class_weight, problem.ignore_index
    soft = target.is_floating_point()
    with torch.no_grad():
        z_loss = torch.zeros_like(loss)
        if problem.z_loss:
            own = own_weight(target, class_weight, ignored, lse.dtype)
            losses = problem.z_loss * own * lse**2
            z_loss = reduced(losses, target, class_weight, problem.reduction, ignored)
        right = (predictions == (target.argmax(-1) if soft else target)).to(lse.dtype)
        kept = counted(target, None, ignored, lse.dtype)
        accuracy = (right * kept).sum() / kept.sum()
    return CrossEntropyStats(loss, z_loss, accuracy, predictions)


def linear_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence of a student's classifier from a teacher's, without their logits.

    Of each token ``sum_c q_c log(q_c / p_c)`` with ``p = softmax((x @ weight.T + bias) / T)`` and q
    the same of the teacher's: `torch.nn.functional.kl_div(log p, q)` summed over the classes.
    Logits of both exist for an eighth of the tokens at a time. Distillation as it was proposed
    multiplies the loss by ``T**2`` (arXiv 1503.02531); this does not.

    Args:
        x: ``[.., K]``, the student's; float32, bfloat16, float16 or float64.
        weight: ``[V, K]``.
        teacher_x: ``[.., K']`` for the same tokens; its dtype and width are its own. A constant, as
            the other two of the teacher are: they get no gradient.
        teacher_weight: ``[V, K']``, for the same classes.
        bias, teacher_bias: ``[V]``, or None.
        target: ``[..]`` int64 labels, of which those that are ``ignore_index`` take their tokens
            out; None counts all.
        ignore_index: see ``target``.
        reduction: "mean" over the tokens that count (torch's "batchmean" of tokens), "sum" over
            them, or "none": ``[..]``.
        temperature: T, a positive number.

    Returns:
        A number, or ``[..]`` for "none", as of `linear_cross_entropy`; gradients come by the same
        paths, of x, weight and bias.

    Raises:
        ValueError: shapes, devices or numbers that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: in double backward, which is not implemented.
    """
    head, teacher = (x, weight, bias), (teacher_x, teacher_weight, teacher_bias)
    return _from_teacher(head, teacher, target, ignore_index, reduction, temperature, 0.0)


def linear_js_div(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student's classifier and a teacher's.

    Of each token ``beta KL(q | m) + (1 - beta) KL(p | m)`` with ``m = beta q + (1 - beta) p``
    (arXiv 2306.13649); 0.5 is the symmetric one. All else is as for `linear_kl_div`.

    Args:
        beta: the teacher's share of the mixture, above 0 and below 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1; got {beta}")
    head, teacher = (x, weight, bias), (teacher_x, teacher_weight, teacher_bias)
    return _from_teacher(head, teacher, target, ignore_index, reduction, temperature, beta)


def _from_teacher(
    head: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor | None,
    ignore_index: int,
    reduction: str,
    temperature: float,
    beta: float,
) -> Tensor:
    (x, weight, bias), (teacher_x, teacher_weight, teacher_bias) = head, teacher
    checks.tensor("teacher_x", teacher_x)
    checks.tensor("teacher_weight", teacher_weight)
    checks.tensors(x=x, weight=weight, bias=bias, target=target)
    checks.tensors(teacher_x=teacher_x, teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    check_options(reduction, ignore_index, 0.0, 0.0, None)
    check_teacher_options(temperature, beta)
    if target is None:
        ignore_index = -100
        target = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        tensors = autocast(x.device.type, x, weight, bias, teacher_x, teacher_weight, teacher_bias)
        x, weight, bias, teacher_x, teacher_weight, teacher_bias = tensors  # type: ignore[assignment]
    given = (x, weight, target, bias, None, teacher_x, teacher_weight, teacher_bias)
    options = (reduction, ignore_index, 0.0, 0.0, 0.0, float(temperature), float(beta))
    return _checked(Problem(*given, *options))  # type: ignore[no-any-return]
