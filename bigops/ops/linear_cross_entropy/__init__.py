"""linear_cross_entropy: a classifier and its loss, the logits never held as a whole.

Schema, reference, fake, autograd, vmap, dispatch, public function, in that order. The gradients
are made in the forward pass, chunk by chunk, while the logits of the chunk are there (as in
Liger-Kernel, arXiv 2410.10989); the backward pass scales them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.backend import machine
from bigops.formats import checks
from bigops.ops import codes
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.library import autocast, define, encoder, loop, register, rows
from bigops.ops.linear_cross_entropy import chunked
from bigops.ops.linear_cross_entropy import triton as _triton_loss
from bigops.ops.linear_cross_entropy.reference import (
    accumulation,
    check,
    check_options,
    check_range,
    no_double_backward,
    own_weight,
    reduced,
    serve_chunk,
    tied,
)

# --- reference -----------------------------------------------------------------------------


def reference(
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
    """The meaning of `linear_cross_entropy` in plain torch; differentiable, holds all logits."""
    logits = F.linear(x, weight, bias)
    logits = rows(logits.to(accumulation(x.dtype)))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    y = target.reshape(-1)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    losses = F.cross_entropy(
        logits,
        y,
        class_weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        own = own_weight(y, class_weight, ignore_index, logits.dtype)
        kept = torch.where(y != ignore_index, logits.logsumexp(1), 0)
        losses = losses + z_loss * own * kept**2
    return reduced(losses.view(target.shape), target, class_weight, reduction, ignore_index)


# --- schema --------------------------------------------------------------------------------

_ARGS = (
    "Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, str reduction, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap"
)
_NEEDS = "bool need_x, bool need_weight, bool need_bias"
_chunk = define(
    "linear_cross_entropy_chunk(Tensor(a!) logits, Tensor target, Tensor? bias, "
    "Tensor? class_weight, Tensor? scale, float class_weight_sum, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool gradient) -> Tensor",
    serve_chunk,
)


def _run(
    args: tuple[Any, ...], needs: tuple[bool, bool, bool], grad: Tensor | None
) -> tuple[Tensor, chunked.Grads, Tensor]:
    """Losses [M], gradients, and the factor (0-dim) that the gradients still lack.

    With ``grad`` they are the gradients for that incoming gradient, and the factor is 1.
    """
    x, weight, target, bias, class_weight, reduction, ignore_index, *rest = args
    check(*args)
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
        return _chunk(  # type: ignore[no-any-return]
            logits, y, bias, class_weight, scale, weight_sum, ignore_index, *rest, gradient
        )

    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        losses, grads = chunked.run(rows(x), weight, y, one_pass, factors, needs)
    gx = None if grads[0] is None else grads[0].view(x.shape)
    return losses, (gx, *grads[1:]), torch.full((), factor, dtype=wide, device=x.device)


def _loss(losses: Tensor, args: tuple[Any, ...]) -> Tensor:
    target, class_weight, reduction, ignore_index = args[2], *args[4:7]
    return reduced(losses.view(target.shape), target, class_weight, reduction, ignore_index)


def _or_empty(x: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _serve(*args):  # type: ignore[no-untyped-def]
    losses, _, _ = _run(args, (False, False, False), None)
    return _loss(losses, args)


def _serve_with_grad(*args):  # type: ignore[no-untyped-def]
    args, needs = args[:10], args[10:]
    if args[5] == "none":
        raise ValueError("reduction: expected mean or sum, whose gradient is one number; got none")
    losses, grads, factor = _run(args, needs, None)
    return _loss(losses, args), *_or_empty(args[0], grads), factor


def _serve_backward(grad, *args):  # type: ignore[no-untyped-def]
    args, needs = args[:10], args[10:]
    expected = args[2].shape if args[5] == "none" else ()
    checks.shape("grad", grad, expected)
    _, (gx, gw, gb), _ = _run(args, needs, grad)
    dtype = args[0].dtype
    return _or_empty(args[0], (gx, *(None if g is None else g.to(dtype) for g in (gw, gb))))


_forward = define(f"linear_cross_entropy({_ARGS}) -> Tensor", _serve)
_with_grad = define(
    f"linear_cross_entropy_with_grad({_ARGS}, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _serve_with_grad,
)
_backward = define(
    f"linear_cross_entropy_backward(Tensor grad, {_ARGS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    _serve_backward,
)
_encoded = encoder(_forward)
_NONE = codes.CODES["reduction"]["none"]

# --- fake ----------------------------------------------------------------------------------


def _fake_chunk(logits, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[0], dtype=accumulation(logits.dtype))


def _fake(*args):  # type: ignore[no-untyped-def]
    check(*args)
    shape = args[2].shape if args[5] == "none" else ()
    return args[0].new_empty(shape, dtype=accumulation(args[0].dtype))


def _fake_with_grad(*args):  # type: ignore[no-untyped-def]
    args, needs = args[:10], args[10:]
    grads = _fake_grads(args, needs, accumulation(args[0].dtype))
    return _fake(*args), *grads, _fake(*args)


def _fake_backward(grad, *args):  # type: ignore[no-untyped-def]
    return _fake_grads(args[:10], args[10:], args[0].dtype)


def _fake_grads(
    args: tuple[Any, ...], needs: tuple[bool, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    x, weight = args[:2]
    shapes = (x.shape, x.dtype), (weight.shape, dtype), (weight.shape[:1], dtype)
    return tuple(
        x.new_empty(shape, dtype=dtype) if need else x.new_empty(0)
        for need, (shape, dtype) in zip(needs, shapes, strict=True)
    )


# --- autograd ------------------------------------------------------------------------------
# In all functions below the order of the arguments is that of the schema, the reduction its code.

_UNDIFFERENTIATED = (None,) * 5  # reduction .. softcap


def _needs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    return x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def _ordered(grads: tuple[Any, ...], needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """Gradients of (x, weight, bias) at the places of the schema's arguments."""
    gx, gw, gb = (g if need else None for g, need in zip(grads, needs, strict=True))
    return gx, gw, None, gb, None, *_UNDIFFERENTIATED


class _LinearCrossEntropy(torch.autograd.Function):
    """Eager autograd. Gradients made in the forward pass are handed out once, scaled in place; a
    second backward of a retained graph computes them anew."""

    @staticmethod
    def forward(ctx, *args):  # type: ignore[no-untyped-def]
        need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        ctx.needs = (need_x, need_weight, need_bias)
        ctx.save_for_backward(*args[:5])
        ctx.options = args[5:]
        ctx.made = None
        with torch._C._AutoDispatchBelowAutograd():
            if args[5] == _NONE:
                return _forward(*args)
            loss, *ctx.made = _with_grad(*args, *ctx.needs)
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        made, ctx.made = ctx.made, None
        with torch.no_grad():
            if made is None:
                grads = _backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs)
            else:
                factor, dtype = grad * made[3], made[0].dtype
                # Reading the factor spares a pass over the gradients where it costs nothing.
                known = type(factor) is Tensor and factor.device.type == "cpu"
                if not known or float(factor) != 1:
                    for g in made[:3]:
                        g.mul_(factor)
                grads = tuple(g.to(dtype) for g in made[:3])
        grads = _ordered(grads, ctx.needs)
        if torch.is_grad_enabled():  # create_graph
            return tied(grads, grad, *ctx.saved_tensors)
        return grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:10]


def _raw_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    needs = (need_x, need_weight, need_bias)
    return _ordered(_backward(grad, *ctx.saved_tensors, *ctx.options, *needs), needs)


def _setup_with_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.made = inputs[10:]


def _scaled_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    needs = (need_x, need_weight, need_bias)
    if any(need and not made for need, made in zip(needs, ctx.made, strict=True)):
        raise RuntimeError(
            "linear_cross_entropy_with_grad: a gradient is asked for that need_x, need_weight and "
            f"need_bias left out; got {list(ctx.made)}"
        )
    sources, (*made, factor) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    scaled = tuple((g * (grad * factor)).to(sources[0].dtype) for g in made)
    grads = _ordered(scaled, needs)
    if torch.is_grad_enabled():  # create_graph
        grads = tied(grads, grad, *sources)
    return *grads, None, None, None


class _Functorch(torch.autograd.Function):
    """Autograd under torch.func transforms; the gradients are computed in the backward pass."""

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        return _lowered(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        needs = (need_x, need_weight, need_bias)
        grads = _lowered_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return _ordered(grads, needs)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _fold(_lowered, args, in_dims, info.batch_size), 0


class _FunctorchBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that vmap of grad finds its rule."""

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        return _lowered_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        no_double_backward()

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return loop(_lowered_backward, args, in_dims, info.batch_size), (0, 0, 0)


def _lowered(*args: Any) -> Tensor:
    """The loss at the level of the transforms that is left."""
    if torch._C._are_functorch_transforms_active():
        return _Functorch.apply(*args)  # type: ignore[no-any-return]
    needs = _needs(args[0], args[1], args[3])
    if torch.is_grad_enabled() and any(needs):
        return _LinearCrossEntropy.apply(*args)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*args)  # type: ignore[no-any-return]


def _lowered_backward(*args: Any) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        return _FunctorchBackward.apply(*args)  # type: ignore[no-any-return]
    return _backward(*args)  # type: ignore[no-any-return]


# --- vmap ----------------------------------------------------------------------------------


def _fold(
    function: Callable[..., Any], args: tuple[Any, ...], in_dims: tuple[Any, ...], batch: int
) -> Tensor:
    """A batch of x and target is more tokens of one call; other batches go one by one."""
    if any(dim is not None for dim in (in_dims[1], *in_dims[3:5])):
        return loop(function, args, in_dims, batch)  # type: ignore[no-any-return]
    x, weight, target, bias, class_weight, reduction, ignore_index, *rest = args

    def batched(t: Tensor, dim: int | None) -> Tensor:
        return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

    x, target = batched(x, in_dims[0]), batched(target, in_dims[2])
    losses = function(x, weight, target, bias, class_weight, _NONE, ignore_index, *rest)
    word = codes.word_of("reduction", reduction)
    return reduced(losses, target, class_weight, word, ignore_index, first=1)


def _vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
    return _fold(_forward, args, in_dims, info.batch_size), 0


def _vmap_with_grad(info, in_dims, *args):  # type: ignore[no-untyped-def]
    return loop(_with_grad, args, in_dims, info.batch_size), (0,) * 5


def _vmap_backward(info, in_dims, *args):  # type: ignore[no-untyped-def]
    return loop(_backward, args, in_dims, info.batch_size), (0, 0, 0)


# --- dispatch ------------------------------------------------------------------------------
# Products and loop are the same on every device; the pass over a chunk has a CPU kernel
# (csrc/cpu/linear_cross_entropy.cpp) and a Triton kernel, elsewhere it is `serve_chunk`.

register(_chunk, fake=_fake_chunk, cuda=_triton_loss.serve_chunk)
register(_forward, fake=_fake, backward=_raw_backward, setup=_setup, vmap=_vmap)
register(
    _with_grad,
    fake=_fake_with_grad,
    backward=_scaled_backward,
    setup=_setup_with_grad,
    vmap=_vmap_with_grad,
)
register(_backward, fake=_fake_backward, backward=no_double_backward, vmap=_vmap_backward)


@serves("linear_cross_entropy")
def _explain(
    x: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    device: str | None = None,
) -> Choice:
    op = "linear_cross_entropy"
    if target is None:
        target = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    check(x, weight, target, bias, None, "mean", -100, 0.0, 0.0, 0.0)
    place = device or ("cpu" if x.device.type == "meta" else x.device.type)
    m, v = math.prod(x.shape[:-1]), weight.shape[0]
    config = {"chunk": min(m, chunked.chunk_rows(m, v, x.element_size()))}
    if place == "cpu" and machine.extension is not None:
        kernel = machine.extension.choose_linear_cross_entropy(checks.short(x.dtype))
        reason = f"own pass over chunks of {config['chunk']} tokens, torch's products"
        return Choice.of(op, kernel, reason, config)
    why = machine.extension_error if place == "cpu" else _triton_loss.why_not(x.dtype, place)
    if place != "cpu" and not why:
        return _triton_loss.explain_chunk(place, x.dtype, v, config)
    return Choice.of(op, f"reference.{op}", why, config)


# --- public function -----------------------------------------------------------------------


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
    products), as it does under torch.func and for a second backward of a retained graph.

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
    checks.tensors(x=x, weight=weight, bias=bias, class_weight=class_weight)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor; got {type(target).__name__}")
    check_options(reduction, ignore_index, label_smoothing, z_loss, softcap)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast(x.device.type, x, weight, bias)  # type: ignore[assignment]
    options = (reduction, ignore_index, float(label_smoothing), float(z_loss), softcap or 0.0)
    check(x, weight, target, bias, class_weight, *options)
    args = _encoded((x, weight, target, bias, class_weight, *options))
    if not torch.compiler.is_compiling():
        return _lowered(*args)
    needs = _needs(x, weight, bias)
    if reduction != "none" and torch.is_grad_enabled() and any(needs):
        return _with_grad(*args, *needs)[0]  # type: ignore[no-any-return]
    return _forward(*args)  # type: ignore[no-any-return]
