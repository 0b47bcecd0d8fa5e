"""linear_cross_entropy: a classifier and its loss, the logits never held as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.ops.library import autocast, encoder
from bigops.ops.linear_cross_entropy import choose as choose  # registers what serves
from bigops.ops.linear_cross_entropy.autograd import call, traced
from bigops.ops.linear_cross_entropy.check import check, check_options
from bigops.ops.linear_cross_entropy.reference import reference
from bigops.ops.linear_cross_entropy.schema import Problem, forward_op

__all__ = ["linear_cross_entropy", "reference"]
_encoded = encoder(forward_op)
_words = forward_op._overloadpacket.default


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
) -> Tensor:
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
        target: ``[..]`` int64, each a class ``0 <= target < V`` or ``ignore_index``.
        bias: ``[V]``, or None.
        ignore_index: target of tokens that count for nothing: loss and gradient are exactly 0.
        reduction: "mean" (over the tokens that count; by class weight where there is one; nan
            where none counts, as in torch), "sum" or "none".
        label_smoothing: part of the target's mass that is spread over all classes, 0 to 1
            (arXiv 1512.00567).
        z_loss: factor of ``logsumexp(logits)^2``, added to each token's loss (arXiv 2204.02311),
            by the class weight of its target.
        softcap: c in ``c tanh(logits / c)`` before the loss (arXiv 2408.00118), or None.
        class_weight: ``[V]`` floating, a constant: it gets no gradient.

    Returns:
        A number, or ``[..]`` for "none"; float32 for bf16 and fp16 (as torch gives under
        autocast), whose logits are stored in x's dtype. Under `torch.autocast` x, weight and bias
        are cast to the autocast dtype first.

    Raises:
        ValueError: shapes, devices or numbers that do not fit, or a target out of range.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: in double backward, which is not implemented.
    """
    if not isinstance(x, Tensor) and torch.overrides.has_torch_function_unary(x):  # of torch.fx
        options = (reduction, ignore_index, label_smoothing, z_loss, softcap or 0.0)
        return _words(x, weight, target, bias, class_weight, *options)  # type: ignore[no-any-return]
    checks.tensors(x=x, weight=weight, target=target, bias=bias, class_weight=class_weight)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor; got {type(target).__name__}")
    check_options(reduction, ignore_index, label_smoothing, z_loss, softcap)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast(x.device.type, x, weight, bias)  # type: ignore[assignment]
    options = (reduction, ignore_index, float(label_smoothing), float(z_loss), softcap or 0.0)
    problem = Problem(x, weight, target, bias, class_weight, *options)
    check(problem)
    args = _encoded(problem)
    return traced(*args) if torch.compiler.is_compiling() else call(*args)
