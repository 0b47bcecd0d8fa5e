"""Gradients of `linear_cross_entropy` along every path.

Eagerly and in a graph that is traced they are made in the forward pass, while the logits of a chunk
are there (as in Liger-Kernel, arXiv 2410.10989), and the backward pass scales them; under
torch.func transforms and by the raw op they are computed there. In forward mode the loss is the
reference, which torch differentiates.

The order of arguments is that of the schema, the reduction its code. With ``stats`` the loss comes
with its statistics, which have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from bigops import backend
from bigops.ops import codes, forward_mode, graph_node
from bigops.ops.library import in_words, loop
from bigops.ops.linear_cross_entropy.chunked import Needs
from bigops.ops.linear_cross_entropy.reference import (
    all_logits,
    divergence,
    own_weight,
    reduced,
    reference,
)
from bigops.ops.linear_cross_entropy.schema import Problem, backward_op, forward_op, with_grad_op

_UNDIFFERENTIATED = (None,) * 11  # class_weight .. beta
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
    return gx, gw, None, gb, *_UNDIFFERENTIATED


def _save(ctx: Any, inputs: Sequence[Any], *made: Tensor) -> None:
    x, weight, target, bias, class_weight, *others = inputs
    teacher_x, teacher_weight, teacher_bias, *ctx.options = others
    teacher = teacher_x, teacher_weight, teacher_bias
    ctx.save_for_backward(x, weight, target, bias, class_weight, *teacher, *made)


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
    def forward(grad, *sources):  # type: ignore[no-untyped-def]
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    backward = staticmethod(no_double_backward)  # type: ignore[assignment]
    jvp = staticmethod(no_double_backward)  # type: ignore[assignment]

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _Tied.apply(*args), in_dims[0]


def _refuse_tangents(*of: Any) -> None:
    """Raise for a tangent of what the kernel of the backward pass takes."""
    if any(map(forward_mode.has_tangent, of)):
        raise NotImplementedError(
            "linear_cross_entropy: forward mode over a backward pass is not implemented; enter "
            "forward mode before the loss is computed"
        )


def _tied(grads: tuple[Any, ...], grad: Tensor, *sources: Tensor | None) -> tuple[Any, ...]:
    if not torch.is_grad_enabled():  # it is with create_graph alone
        return grads
    if not torch._C._functorch.is_legacy_batchedtensor(grad):
        return tuple(g if g is None else _Tied.apply(g, grad, *sources) for g in grads)
    # Autograd of a batch looks below it, where the result of a Function is a constant.
    zero = _Tied.apply(torch.zeros((), device=grad.device), *sources)
    return tuple(g if g is None else g + zero.to(g.dtype) for g in grads)


# --- eager ---------------------------------------------------------------------------------


class _Recomputing(torch.autograd.Function):
    """Reduction "none": a backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, stats, *args):  # type: ignore[no-untyped-def]
        _save(ctx, args)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            found = _forward(args, stats)
        if stats:
            _, *statistics = found
            ctx.mark_non_differentiable(*statistics)
        return found

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        _, *needs = ctx.needs_input_grad
        needs = needs[0], needs[1], needs[3]
        _refuse_tangents(grad)
        with _no_grad_but_in_batches(grad):
            grads = backward_op(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return None, *_tied(_ordered(grads, needs), grad, *ctx.saved_tensors)


class _MadeInForward(torch.autograd.Function):
    """Reductions to a number: gradients are made in the forward pass, and scaled here, in place
    unless the graph is retained. Nothing of x is kept."""

    @staticmethod
    def forward(ctx, stats, stub, *args):  # type: ignore[no-untyped-def]
        _, _, *needs = ctx.needs_input_grad
        x, weight, _, bias, *_ = args
        ctx.needs = needs[0], needs[1], needs[3]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            loss, *ctx.made, lse, predictions = with_grad_op(*args, *ctx.needs, stats)
        ctx.dtype = x.dtype
        ctx.save_for_backward(stub, weight, bias)
        if not stats:
            return loss
        ctx.mark_non_differentiable(lse, predictions)
        return loss, lse, predictions

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        sources = ctx.saved_tensors  # raises where the graph is freed
        *grads, factor = ctx.made
        with _no_grad_but_in_batches(grad):
            factor = grad * factor
            if _is_batched(grad) or torch._C._autograd._get_current_graph_task_keep_graph():
                grads = [g * factor for g in grads]
            else:
                ctx.made = None
                # Reading the factor spares a pass over the gradients where it costs nothing.
                known = type(factor) is Tensor and factor.device.type == "cpu"
                if not known or float(factor) != 1:
                    for g in grads:
                        g.mul_(factor)
            grads = [g.to(ctx.dtype) for g in grads]
        return None, None, *_tied(_ordered(grads, ctx.needs), grad, *sources)


def _forward(args: Sequence[Any], stats: bool) -> Any:
    """The loss by an op that makes no gradient; with ``stats`` (loss, logsumexp, predictions)."""
    if not stats:
        return forward_op(*args)
    loss, _, _, _, _, lse, predictions = with_grad_op(*args, False, False, False, True)
    return loss, lse, predictions


def _is_batched(t: Tensor) -> bool:
    """Whether t may be a batch: of torch.vmap, or of torch.autograd's older one."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or torch._C._functorch.is_legacy_batchedtensor(t)


def _no_grad_but_in_batches(grad: Tensor) -> Any:
    """`torch.no_grad`, but for a batch that `torch.autograd.grad` makes: see `_tied`."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.set_grad_enabled(batched and torch.is_grad_enabled())


def _stub(x: Tensor) -> Tensor:
    """No element of x, and its place in the graph."""
    return x.narrow(-1, 0, 0).clone()


# --- raw ops -------------------------------------------------------------------------------


def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = _needs(ctx)
    return _ordered(backward_op(grad, *ctx.saved_tensors, *ctx.options, *needs), needs)


def setup_with_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *problem, need_x, need_weight, need_bias, _ = inputs
    _, *made = output
    ctx.mark_non_differentiable(*made)
    *made, _, _ = made
    _save(ctx, problem, *made)
    ctx.made = (need_x, need_weight, need_bias)


def scaled_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    needs = _needs(ctx)
    *tensors, gx, gw, gb, factor = ctx.saved_tensors
    x, *_ = tensors
    reduction, *_ = ctx.options
    if reduction == _NONE:  # its gradient is none of one number, and made anew
        grads = _ordered(backward_op(grad, *tensors, *ctx.options, *needs), needs)
        return *_tied(grads, grad, *tensors), *(None,) * 4
    if any(need and not made for need, made in zip(needs, ctx.made, strict=True)):
        raise RuntimeError(
            "linear_cross_entropy_with_grad: a gradient is asked for that need_x, need_weight and "
            f"need_bias left out; got {list(ctx.made)}"
        )
    scaled = tuple((g * (grad * factor)).to(x.dtype) for g in (gx, gw, gb))
    return *_tied(_ordered(scaled, needs), grad, *tensors), *(None,) * 4


# --- torch.func ----------------------------------------------------------------------------


class _Functorch(torch.autograd.Function):
    """Autograd under torch.func transforms."""

    @staticmethod
    def forward(stats, *args):  # type: ignore[no-untyped-def]
        return call(*args, stats=stats)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        stats, *args = inputs
        _save(ctx, args)
        if stats:
            _, *statistics = output
            ctx.mark_non_differentiable(*statistics)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        _, *needs = ctx.needs_input_grad
        needs = needs[0], needs[1], needs[3]
        grads = _call_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return None, *_ordered(grads, needs)

    @staticmethod
    def vmap(info, in_dims, stats, *args):  # type: ignore[no-untyped-def]
        _, *dims = in_dims
        return _fold(call, args, dims, info.batch_size, stats), (0, 0, 0) if stats else 0


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


def call(*args: Any, stats: bool = False) -> Any:
    """The loss at the level of the transforms that is left; with ``stats`` (loss, logsumexp,
    predictions)."""
    if forward_mode.is_active():
        loss = expression(*args)
        return (loss, *_statistics(*args)) if stats else loss
    if torch._C._are_functorch_transforms_active():
        return _Functorch.apply(stats, *args)  # type: ignore[no-untyped-call]
    problem = Problem(*args)
    x = problem.x
    if torch.is_grad_enabled() and any(needs_of(x, problem.weight, problem.bias)):
        if problem.reduction == _NONE:
            return _Recomputing.apply(stats, *args)  # type: ignore[no-untyped-call]
        stub = _stub(x) if x.requires_grad else None
        return _MadeInForward.apply(stats, stub, *args)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _forward(args, stats)


def expression(*args: Any) -> Tensor:
    """The loss by torch's own operations, which torch differentiates forward, and any number of
    times."""
    return _in_words(*args)  # type: ignore[no-any-return]


def by_reference(*args: Any) -> Tensor:
    """`expression` of arguments in words."""
    backend.note("reference.linear_cross_entropy")
    given = Problem(*args)._asdict()
    with torch.autocast(given["x"].device.type, enabled=False):
        if given["teacher_x"] is not None:
            for name in _OF_CLASSES:
                del given[name]
            return divergence(**given)
        for name in _OF_A_TEACHER:
            del given[name]
        return reference(**given)


_OF_CLASSES = ("class_weight", "label_smoothing", "z_loss", "softcap")
_OF_A_TEACHER = ("teacher_x", "teacher_weight", "teacher_bias", "temperature", "beta")


def _statistics(*args: Any) -> tuple[Tensor, Tensor]:
    """logsumexp and prediction of each token by torch's own operations."""
    problem = Problem(*args)
    x, weight, bias = problem.x, problem.weight, problem.bias
    logits = all_logits(x, weight, bias, problem.softcap).detach()
    kept = own_weight(problem.target, None, problem.ignore_index, logits.dtype) != 0
    tokens = x.shape[:-1]
    lse = torch.where(kept, logits.logsumexp(1).view(tokens), 0)
    return lse, logits.argmax(1).view(tokens)


_in_words = in_words(forward_op, by_reference)


def _node(*args: Any) -> Any:
    *problem, need_x, need_weight, need_bias, stats = args
    if torch._C._are_functorch_transforms_active() or forward_mode.is_active():
        return call(*problem, stats=stats)
    if not (need_x or need_weight or need_bias or stats):
        return forward_op(*problem)
    loss, _, _, _, _, lse, predictions = with_grad_op(*args)
    return (loss, lse, predictions) if stats else loss


graph_node.add("linear_cross_entropy", _node)


def traced(*args: Any, stats: bool = False) -> Any:
    """`call` in a graph that torch.compile or torch.export makes."""
    graph_node.allow("linear_cross_entropy")
    problem = Problem(*args)
    needs = (False, False, False)
    if problem.reduction != _NONE and torch.is_grad_enabled():
        needs = needs_of(problem.x, problem.weight, problem.bias)
    return _node(*args, *needs, stats)


def _call_backward(*args: Any) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        _refuse_tangents(*args)
        return _FunctorchBackward.apply(*args)  # type: ignore[no-any-return]
    return backward_op(*args)  # type: ignore[no-any-return]


def _fold(
    function: Callable[..., Any],
    args: Sequence[Any],
    in_dims: Sequence[Any],
    batch: int,
    stats: bool = False,
) -> Any:
    """A batch of x and target is more tokens of one call; other batches go one by one."""
    problem, dims = Problem(*args), Problem(*in_dims)
    options = {"stats": True} if stats else {}
    shared = (dims.weight, dims.bias, dims.class_weight, dims.teacher_weight, dims.teacher_bias)
    if any(dim is not None for dim in shared):
        return loop(partial(function, **options), args, in_dims, batch)

    def batched(t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

    names = ("x", "target", "teacher_x")
    tokens = {name: batched(getattr(problem, name), getattr(dims, name)) for name in names}
    found = function(*problem._replace(**tokens, reduction=_NONE), **options)
    losses, *statistics = found if stats else (found,)
    word = codes.word_of("reduction", problem.reduction)
    shape = tokens["target"], problem.class_weight, word, problem.ignore_index
    loss = reduced(losses, *shape, first=1)  # type: ignore[arg-type]
    return (loss, *statistics) if stats else loss


def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return _fold(forward_op, args, in_dims, info.batch_size), 0


def vmap_with_grad(info: Any, in_dims: Any, *args: Any) -> tuple[Any, ...]:
    return loop(with_grad_op, args, in_dims, info.batch_size), (0,) * 7


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, ...]:
    return loop(backward_op, args, in_dims, info.batch_size), (0, 0, 0)
