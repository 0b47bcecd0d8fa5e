"""What serves `rotary`, for dispatch and for `bigops.explain`.

The CPU kernels register themselves (csrc/cpu/rotary.cpp); other devices take the reference.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu
from bigops.ops.choice import reference as by_reference
from bigops.ops.explain import serves
from bigops.ops.library import define, loop, register
from bigops.ops.rotary.check import check
from bigops.ops.rotary.reference import reference

NAME = "rotary"
INFERENCE_ONLY = (
    "rotary: inference only, and a gradient was asked for; call it under torch.no_grad() or "
    "torch.inference_mode(), or take bigops.ops.rotary.reference, which has one"
)


def _serve(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    check(x, cos, sin)
    backend.note("reference.rotary")
    return reference(x, cos, sin)


op = define("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", _serve)


def refuse_gradients(*_: Any) -> NoReturn:
    raise RuntimeError(INFERENCE_ONLY)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    check(x, cos, sin)
    b, heads, t, d = x.shape
    return x.new_empty(b, t, heads, d).transpose(1, 2)


def _vmap(info: Any, in_dims: Any, *args: Tensor) -> tuple[Tensor, int]:
    """A batch of x is more items of one call; one x for many tables goes one by one."""
    (x, *tables), (x_dim, *dims), batch = args, in_dims, info.batch_size
    if x_dim is None or batch == 0:
        return loop(op, args, in_dims, batch), 0
    x = x.movedim(x_dim, 0)
    spread = (
        _spread(table, dim, batch, x.shape[1]) for table, dim in zip(tables, dims, strict=True)
    )
    return op(x.flatten(0, 1), *spread).unflatten(0, (batch, -1)), 0


def _spread(table: Tensor, dim: int | None, batch: int, items: int) -> Tensor:
    """[.., T, R] or [batch, .., T, R] as [batch * items, T, R], where one does not serve all."""
    if dim is None:
        if table.dim() == 2 or table.shape[0] == 1:
            return table
        table = table.unsqueeze(0)
    else:
        table = table.movedim(dim, 0)
    sizes = table.shape[-2:]
    own = 1 if table.dim() == 3 else table.shape[1]
    table = table.reshape(table.shape[0], own, *sizes)
    return table.expand(batch, items, *sizes).flatten(0, 1)


register(op, fake=_fake, backward=refuse_gradients, vmap=_vmap, expression=reference)


@serves(NAME)
def _explain(
    x: Tensor, cos: Tensor, sin: Tensor | None = None, *, device: str | None = None
) -> Choice:
    check(x, cos, cos if sin is None else sin)
    target = targets.named(device, x)
    if not targets.is_cpu(target):
        targets.present(target)  # it refuses what is no device
        return by_reference(NAME, "no GPU kernel of this op: torch.compile fuses it there")
    dtype = checks.short(x.dtype)
    reason = "one pass over memory, cos and sin read once for all heads of a token"
    return on_cpu(NAME, lambda extension: (extension.choose_rotary(dtype), reason))
