"""Logits that stand for a head and what enters it, so that a loss of them never makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigops.nn.computed_weight import ComputedTensor
from bigops.ops.fused_linear import fused_linear
from bigops.ops.linear_cross_entropy import linear_cross_entropy


class LossHead(nn.Linear):
    """The last layer of a model, whose logits may be `Logits` (see `bigops.train.chunked_loss_`).

    Parameters and `state_dict` are those of `nn.Linear`.
    """

    lazy = False  # set while the model makes a loss
    strict = False  # whether what needs the numbers of its logits raises
    fused = False  # whether it took the place of a `bigops.nn.Linear`

    @classmethod
    def from_linear(cls, linear: nn.Linear, fused: bool) -> LossHead:
        """A layer that shares the Parameter objects of ``linear``."""
        size = linear.in_features, linear.out_features, linear.bias is not None
        new = cls(*size, device="meta")
        new.weight, new.bias, new.fused = linear.weight, linear.bias, fused
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.lazy and not _transformed():  # nor is it while a graph is traced
            return logits_of(self, input)
        return (fused_linear if self.fused else F.linear)(input, self.weight, self.bias)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


class NeededError(Exception):
    """The numbers of logits of a strict head were needed."""


@dataclass(frozen=True)
class _Head:
    """``cap tanh(scale (x W^T + bias) / cap)``, or without the cap, in ``dtype``."""

    of: LossHead
    x: Tensor  # [.., K]
    weight: Tensor
    bias: Tensor | None
    version: int  # of the weight, as it was in the forward pass
    autocast: torch.dtype | None
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.x.shape[:-1], self.weight.shape[0]])

    def as_then(self) -> AbstractContextManager[Any]:
        """Autocast as it was in the forward pass."""
        on = self.autocast is not None
        return torch.autocast(self.x.device.type, dtype=self.autocast, enabled=on)

    def check(self) -> None:
        """Raise RuntimeError where the weight is no longer that of the forward pass."""
        if self.weight._version != self.version:
            raise RuntimeError(
                "logits: expected the head's weight as it was in the forward pass; got one that "
                "was written since; read logits before the optimiser steps"
            )
        plain = type(self.weight) in (Tensor, nn.Parameter)
        if plain and self.weight.numel() and not self.weight.untyped_storage().nbytes():
            raise RuntimeError(
                "logits: expected the head's weight in memory; got one whose memory was freed, as "
                "fully_shard does after the forward pass of a head of its own; shard it with the "
                "model around it"
            )

    def make(self) -> Tensor:
        """The logits themselves."""
        self.check()
        with self.as_then():
            logits = F.linear(self.x, self.weight, self.bias)
            if self.cap is not None:
                logits = self.cap * torch.tanh(logits * (self.scale / self.cap))
            elif self.scale != 1:
                logits = logits * self.scale
        return logits.to(self.dtype)

    def loss(self, target: Tensor, options: dict[str, Any]) -> Tensor:
        """Their cross entropy."""
        self.check()
        scaled = self.scale != 1
        wide = self.autocast is not None
        with self.as_then():
            loss = linear_cross_entropy(
                self.x * self.scale if scaled else self.x,
                self.weight,
                target,
                self.bias * self.scale if scaled and self.bias is not None else self.bias,
                softcap=self.cap,
                **options,
            )
        return loss if wide else loss.to(self.dtype)


class Logits(ComputedTensor):
    """Logits [.., V] of a `LossHead`, made where their numbers are needed.

    Views of whole rows, casts, a number's product or quotient, tanh, and a sum with [V] give others
    of their kind; `torch.nn.functional.cross_entropy` of them is one `linear_cross_entropy` call.
    """

    part = "logits"
    head: _Head | None = None

    def numbers(self) -> Tensor:
        if self.head is not None and self.head.of.strict:
            raise NeededError
        return super().numbers()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.cross_entropy:
            found = _cross_entropy(*args, **(kwargs or {}))
        else:
            found = _lazily(func, args, kwargs or {})
        if found is not NotImplemented:
            return found
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except NeededError as error:
            raise NeededError(getattr(func, "__name__", str(func))) from error


class _Linked(torch.autograd.Function):
    """Logits in the graph, for what takes their numbers below autograd."""

    @staticmethod
    def forward(ctx, head, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.head = replace(head, x=None, weight=None, bias=None)
        ctx.save_for_backward(x, weight, bias)
        like = torch.empty(head.shape, dtype=head.dtype, device="meta")
        why = "the logits are made where they are read"
        new = Logits(head.make, like, x.device, False, "LossHead", why)
        new.head = head
        return new

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            names = ("x", "weight", "bias")
            leaves = {
                name: t if t is None else t.detach().requires_grad_()
                for name, t in zip(names, ctx.saved_tensors, strict=True)
            }
            # saved tensors are those of the forward pass, as autograd has seen
            version = leaves["weight"]._version  # type: ignore[union-attr]
            logits = replace(ctx.head, **leaves, version=version).make()
        wanted = [t for t in leaves.values() if t is not None]
        found = iter(torch.autograd.grad(logits, wanted, grad))
        return None, *(t if t is None else next(found) for t in leaves.values())


def _linked(head: _Head) -> Logits:
    return _Linked.apply(head, head.x, head.weight, head.bias)  # type: ignore[no-any-return]


def logits_of(layer: LossHead, x: Tensor) -> Logits:
    """The logits of ``layer`` on x [.., K]."""
    device = x.device.type
    cast = None
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        cast = torch.get_autocast_dtype(device)
    weight = layer.weight
    return _linked(_Head(layer, x, weight, layer.bias, weight._version, cast, cast or x.dtype))


# --- what leaves them unmade -----------------------------------------------------------------


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy`, whose classes are the second dimension, or NotImplemented."""
    if not isinstance(input, Logits) or isinstance(target, Logits) or input.dim() > 2:
        return NotImplemented
    head = input.head
    if head is None or (size_average, reduce) != (None, None) or target.requires_grad:
        return NotImplemented
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "class_weight": weight,
    }
    return head.loss(target, options)


def _lazily(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` makes of logits without their numbers, or NotImplemented."""
    rule = _RULES.get(func)
    if rule is None:
        return NotImplemented
    logits, *rest = args or (None,)
    if len(rest) == 1 and not isinstance(logits, Logits) and rule in (_scaled, _shifted):
        logits, rest = rest[0], [logits]
    if not isinstance(logits, Logits) or logits.head is None:
        return NotImplemented
    head = rule(logits.head, *rest, **kwargs)
    return NotImplemented if head is None else _linked(head)


def _cast(head: _Head, *to: Any, **options: Any) -> _Head | None:
    """`Tensor.to`: a dtype, and a device that is theirs."""
    for a in (*to, *options.values()):
        given = (a.dtype, a.device) if isinstance(a, Tensor) else (a,)
        for part in given:
            if isinstance(part, torch.dtype) and part.is_floating_point:
                head = replace(head, dtype=part)
            elif isinstance(part, bool | torch.memory_format | None):
                continue
            elif isinstance(part, str | int | torch.device):
                device = torch.device(part)
                if device.type != head.x.device.type or device.index not in (
                    None,
                    head.x.device.index,
                ):
                    return None
            else:
                return None
    return head


def _viewed(head: _Head, *sizes: Any) -> _Head | None:
    """`Tensor.view` and `reshape` that keep the last dimension."""
    shape = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes)
    if not all(isinstance(n, int) for n in shape) or not shape:
        return None
    *lead, last = shape
    if last == -1 and math.prod(lead) == math.prod(head.x.shape[:-1]):
        last = head.shape[-1]
    if last != head.shape[-1]:
        return None
    return replace(head, x=head.x.reshape(*lead, head.x.shape[-1]))


def _indexed(head: _Head, index: Any) -> _Head | None:
    """Items that keep the last dimension whole."""
    index = list(index) if isinstance(index, tuple) else [index]
    taken = 0
    for part in index:
        if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
            taken += part.dim()
        elif isinstance(part, int | slice | Tensor) and not isinstance(part, bool):
            taken += 1
        elif part is not None and part is not Ellipsis:
            return None
    ndim = len(head.shape)
    reaches = taken == ndim or (Ellipsis in index and index[-1] is not Ellipsis)
    if taken > ndim or (reaches and index[-1] != slice(None)):
        return None
    return replace(head, x=head.x[tuple(index)])


def _scaled(head: _Head, by: Any) -> _Head | None:
    if isinstance(by, bool) or not isinstance(by, int | float) or not 0 < by < math.inf:
        return None
    if head.cap is None:
        return replace(head, scale=head.scale * by)
    return replace(head, scale=head.scale * by, cap=head.cap * by)


def _divided(head: _Head, by: Any, **options: Any) -> _Head | None:
    if options or isinstance(by, bool) or not isinstance(by, int | float) or not by:
        return None
    return _scaled(head, 1 / by)


def _tanh(head: _Head) -> _Head | None:
    return replace(head, cap=1.0) if head.cap is None else None


def _shifted(head: _Head, by: Any, **options: Any) -> _Head | None:
    """A sum with one number a class."""
    classes = head.shape[-1]
    if options or head.cap is not None or head.scale != 1 or not isinstance(by, Tensor):
        return None
    if by.numel() != classes or by.shape[-1:] != (classes,) or by.dim() > len(head.shape):
        return None
    dtype = torch.promote_types(head.dtype, by.dtype)
    bias = by.reshape(-1).to(head.weight.dtype)
    return replace(head, bias=bias if head.bias is None else head.bias + bias, dtype=dtype)


def _to(dtype: torch.dtype) -> Callable[[_Head], _Head]:
    return lambda head: replace(head, dtype=dtype)


_RULES: dict[Any, Callable[..., _Head | None]] = {
    Tensor.to: _cast,
    Tensor.type_as: _cast,
    Tensor.float: _to(torch.float32),
    Tensor.double: _to(torch.float64),
    Tensor.half: _to(torch.float16),
    Tensor.bfloat16: _to(torch.bfloat16),
    Tensor.contiguous: lambda head: head,
    Tensor.__getitem__: _indexed,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _viewed),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _tanh),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _scaled),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _divided),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _shifted),
}
