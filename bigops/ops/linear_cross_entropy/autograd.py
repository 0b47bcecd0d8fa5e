"""Gradients of `linear_cross_entropy` along every path.

Eagerly and in a graph that is traced they are made in the forward pass, while the logits of a chunk
are there (as in Liger-Kernel, arXiv 2410.10989), and the backward pass scales them; under
torch.func transforms, by the raw op and in a second backward they are computed there.

The order of arguments is that of the schema, the reduction its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from bigops.ops import codes
from bigops.ops.library import loop
from bigops.ops.linear_cross_entropy.chunked import Needs
from bigops.ops.linear_cross_entropy.reference import reduced
from bigops.ops.linear_cross_entropy.schema import Problem, backward_op, forward_op, with_grad_op

_UNDIFFERENTIATED = (None,) * 5  # reduction .. softcap
_NONE = codes.CODES["reduction"]["none"]


def needs_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which of these need a gradient."""
    return x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def _needs(ctx: Any) -> Needs:
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    return need_x, need_weight, need_bias


def _ordered(grads: Any, needs: Needs) -> tuple[Any, ...]:
    """Gradients of (x, weight, bias) at the places of the schema's arguments."""
    gx, gw, gb = (g if need else None for g, need in zip(grads, needs, strict=True))
    return gx, gw, None, gb, None, *_UNDIFFERENTIATED


def _save(ctx: Any, inputs: Sequence[Any], *made: Tensor) -> None:
    x, weight, target, bias, class_weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight, target, bias, class_weight, *made)


# --- no second order -----------------------------------------------------------------------


def no_double_backward(*_: Any) -> NoReturn:
    raise RuntimeError(
        "linear_cross_entropy: double backward is not implemented; "
        "bigops.ops.linear_cross_entropy.reference has gradients of every order"
    )


class _Tied(torch.autograd.Function):
    """Ties a gradient to what it was made of, so that differentiating it raises: it would count
    as a constant otherwise."""

    @staticmethod
    def forward(ctx, grad, *sources):  # type: ignore[no-untyped-def]
        return grad.view_as(grad)

    backward = staticmethod(no_double_backward)  # type: ignore[assignment]


def _tied(grads: tuple[Any, ...], *sources: Tensor | None) -> tuple[Any, ...]:
    if not torch.is_grad_enabled():  # it is with create_graph alone
        return grads
    return tuple(g if g is None else _Tied.apply(g, *sources) for g in grads)


# --- eager ---------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients made in the forward pass are handed out once, scaled in place; a second backward
    of a retained graph computes them anew."""

    @staticmethod
    def forward(ctx, *args):  # type: ignore[no-untyped-def]
        ctx.needs, ctx.made = _needs(ctx), None
        _save(ctx, args)
        reduction, *_ = ctx.options
        with torch._C._AutoDispatchBelowAutograd():
            if reduction == _NONE:
                return forward_op(*args)
            loss, *ctx.made = with_grad_op(*args, *ctx.needs)
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        made, ctx.made = ctx.made, None
        with torch.no_grad():
            if made is None:
                grads = backward_op(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs)
            else:
                *grads, factor = made
                dtype, factor = grads[0].dtype, grad * factor
                # Reading the factor spares a pass over the gradients where it costs nothing.
                known = type(factor) is Tensor and factor.device.type == "cpu"
                if not known or float(factor) != 1:
                    for g in grads:
                        g.mul_(factor)
                grads = [g.to(dtype) for g in grads]
        return _tied(_ordered(grads, ctx.needs), grad, *ctx.saved_tensors)


# --- raw ops -------------------------------------------------------------------------------


def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs)


def backward(ctx: Any, grad: Tensor, by: Callable[..., Any] = backward_op) -> tuple[Any, ...]:
    needs = _needs(ctx)
    return _ordered(by(grad, *ctx.saved_tensors, *ctx.options, *needs), needs)


def setup_with_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *problem, need_x, need_weight, need_bias = inputs
    _, *made = output
    ctx.mark_non_differentiable(*made)
    _save(ctx, problem, *made)
    ctx.made = (need_x, need_weight, need_bias)


def scaled_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    needs = _needs(ctx)
    if any(need and not made for need, made in zip(needs, ctx.made, strict=True)):
        raise RuntimeError(
            "linear_cross_entropy_with_grad: a gradient is asked for that need_x, need_weight and "
            f"need_bias left out; got {list(ctx.made)}"
        )
    x, weight, target, bias, class_weight, *made, factor = ctx.saved_tensors
    scaled = tuple((g * (grad * factor)).to(x.dtype) for g in made)
    grads = _tied(_ordered(scaled, needs), grad, x, weight, target, bias, class_weight)
    return *grads, None, None, None


# --- torch.func ----------------------------------------------------------------------------


class _Functorch(torch.autograd.Function):
    """Autograd under torch.func transforms."""

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        return call(*args)

    setup_context = staticmethod(setup)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return backward(ctx, grad, by=_call_backward)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _fold(call, args, in_dims, info.batch_size), 0


class _FunctorchBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that vmap of grad finds its rule."""

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        return _call_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    backward = staticmethod(no_double_backward)  # type: ignore[assignment]

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return loop(_call_backward, args, in_dims, info.batch_size), (0, 0, 0)


def call(*args: Any) -> Tensor:
    """The loss at the level of the transforms that is left."""
    if torch._C._are_functorch_transforms_active():
        return _Functorch.apply(*args)  # type: ignore[no-any-return]
    x, weight, _, bias, *_ = args
    if torch.is_grad_enabled() and any(needs_of(x, weight, bias)):
        return _LinearCrossEntropy.apply(*args)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return forward_op(*args)  # type: ignore[no-any-return]


def _call_backward(*args: Any) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        return _FunctorchBackward.apply(*args)  # type: ignore[no-any-return]
    return backward_op(*args)  # type: ignore[no-any-return]


def _fold(
    function: Callable[..., Any], args: tuple[Any, ...], in_dims: tuple[Any, ...], batch: int
) -> Tensor:
    """A batch of x and target is more tokens of one call; other batches go one by one."""
    problem, dims = Problem(*args), Problem(*in_dims)
    if any(dim is not None for dim in (dims.weight, dims.bias, dims.class_weight)):
        return loop(function, args, in_dims, batch)  # type: ignore[no-any-return]

    def batched(t: Tensor, dim: int | None) -> Tensor:
        return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

    x, target = batched(problem.x, dims.x), batched(problem.target, dims.target)
    losses = function(*problem._replace(x=x, target=target, reduction=_NONE))
    word = codes.word_of("reduction", problem.reduction)
    return reduced(losses, target, problem.class_weight, word, problem.ignore_index, first=1)


def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return _fold(forward_op, args, in_dims, info.batch_size), 0


def vmap_with_grad(info: Any, in_dims: Any, *args: Any) -> tuple[Any, ...]:
    return loop(with_grad_op, args, in_dims, info.batch_size), (0,) * 5


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, ...]:
    return loop(backward_op, args, in_dims, info.batch_size), (0, 0, 0)
