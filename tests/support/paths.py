"""The paths by which a gradient is reached. `opcheck` proves none of them: each is compared with
float64 (see `Case.check_gradients`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.ops.family import LinearOp
from bigops.ops.library import encoder

Op = Callable[..., Tensor]  # f(*tensors) -> y
Grads = list[Tensor | None]


def opcheck(packet: Any, args: Sequence[Any], **options: Any) -> None:
    """`torch.library.opcheck` of the overload that has kernels; the arguments in words."""
    torch.library.opcheck(packet.code, tuple(encoder(packet.code)(args)), **options)


def plant(
    monkeypatch: pytest.MonkeyPatch, op: LinearOp, **wrong: Callable[[Tensor], Tensor]
) -> None:
    """Make gradients of an op wrong on every path: ``need_x``, ``need_bias`` or ``need_values``."""
    gradients = op.gradients
    for name in ("backward", "_expression"):
        true = getattr(gradients, name)

        def planted(*args: Any, true: Any = true) -> tuple[Tensor | None, ...]:
            found = dict(zip(gradients.needs, true(*args), strict=True))
            for need, change in wrong.items():
                found[need] = None if found[need] is None else change(found[need])
            return tuple(found.values())

        monkeypatch.setattr(gradients, name, planted)


def _gradients(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(f(*leaves), wanted, grad))
    return [None if t is None else next(found) for t in leaves]


def eager(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    """Gradients by f as it is (pass the raw `torch.ops` call for the raw path)."""
    return _gradients(f, leaves, grad)


def compiled(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    """Gradients through torch.compile without graph breaks."""
    torch._dynamo.reset()
    return _gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), leaves, grad)


def inductor(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    """As `compiled`, with code generation: slower, for a few cases."""
    torch._dynamo.reset()
    return _gradients(torch.compile(f, fullgraph=True), leaves, grad)


class _Wrapped(torch.nn.Module):
    def __init__(self, f: Op) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Tensor | None) -> Tensor:
        return self.f(*args)


def exported(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    """Gradients of a torch.export graph."""
    example = tuple(None if t is None else t.detach() for t in leaves)
    module = torch.export.export(_Wrapped(f), example, strict=False).module()
    return _gradients(module, leaves, grad)


def grad_of_vmap(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    """torch.func.grad over torch.vmap of single rows; x and the last input have a row each."""
    present = [i for i, t in enumerate(leaves) if t is not None]
    tensors = [t.detach() for t in leaves if t is not None]

    def call(*some: Tensor) -> Tensor:
        full: list[Tensor | None] = [None] * len(leaves)
        for i, t in zip(present, some, strict=True):
            full[i] = t
        return f(*full)

    in_dims = tuple(0 if i in (0, len(leaves) - 1) else None for i in present)

    def loss(*some: Tensor) -> Tensor:
        return (torch.vmap(call, in_dims=in_dims)(*some) * grad).sum()

    found = iter(torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors))
    return [None if t is None else next(found) for t in leaves]


def after_step(f: Op, leaves: Sequence[Tensor | None], grad: Tensor) -> Grads:
    """Gradients at the given values, reached by an in-place optimiser step from other values.

    Anything remembered of the old values (a stale pack, a saved tensor) shows here.
    """
    targets = [None if t is None else t.detach().clone() for t in leaves]
    wanted = [t for t in leaves if t is not None]
    with torch.no_grad():
        for t in wanted:
            t.add_(1.0)
    optimizer = torch.optim.SGD(wanted, lr=1.0)
    f(*leaves).sum().backward()
    for t, target in zip(wanted, [t for t in targets if t is not None], strict=True):
        t.grad = t.detach() - target
    optimizer.step()
    with torch.no_grad():  # x - (x - target) rounds: land on the target itself, in place
        for t, target in zip(wanted, [t for t in targets if t is not None], strict=True):
            t.copy_(target)
    return _gradients(f, leaves, grad)


PATHS: dict[str, Callable[[Op, Sequence[Tensor | None], Tensor], Grads]] = {
    "eager": eager,
    "compiled": compiled,
    "exported": exported,
    "grad_of_vmap": grad_of_vmap,
    "after_step": after_step,
}
