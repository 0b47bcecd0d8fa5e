"""Tensors that are split over a mesh (DTensor): their local parts, states that lie as they do."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from bigops.ops.fused_adamw import states
from bigops.optim.options import RefusedError

Place = tuple[int, int, int]
"""First, run and stride of a part of a tensor, see `bigops.fused_adamw`."""


def is_split(t: Any) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor takes long to import."""
    return hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """This rank's part, in its own memory."""
    return t.to_local() if is_split(t) else t  # type: ignore[attr-defined,no-any-return]


def gradient(param: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, which lies as the parameter does.

    Raises:
        TypeError: of parameter and gradient one is a DTensor.
    """
    grad = param.grad
    assert grad is not None
    if is_split(param) != is_split(grad):
        raise TypeError(
            f"params: expected a gradient of the parameter's kind, {type(param).__name__}; got "
            f"{type(grad).__name__}"
        )
    if not is_split(param):
        return grad
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def check_alike(name: str, held: Tensor, param: Tensor) -> None:
    """Raise ValueError unless a state lies as its DTensor does."""
    if not is_split(held) or held.placements != param.placements:  # type: ignore[attr-defined]
        raise ValueError(
            f"params: expected what {name} was made for, "
            f"{held.placements if is_split(held) else 'a plain tensor'}; got a parameter placed as "  # type: ignore[attr-defined]
            f"{param.placements} (was the model split after a step?)"  # type: ignore[attr-defined]
        )


def wrap(part: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of which ``part`` is this rank's, placed as ``like`` is."""
    if not is_split(like):
        return part
    from torch.distributed.tensor import DTensor

    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )


def laid(value: Tensor, like: Tensor) -> Tensor:
    """A loaded tensor, whole or split, as ``like`` lies: split as it is, or whole."""
    if not is_split(like):
        return value.full_tensor() if is_split(value) else value  # type: ignore[attr-defined,no-any-return]
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if is_split(value):
        if value.device_mesh == mesh:  # type: ignore[attr-defined]
            if value.placements == placements:  # type: ignore[attr-defined]
                return value
            return value.redistribute(mesh, placements)  # type: ignore[attr-defined,no-any-return]
        value = value.full_tensor()  # type: ignore[attr-defined]
    # every rank has read the whole: nothing is sent
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def whole(t: Tensor) -> Place:
    """The place of a tensor that is no part."""
    numel = max(t.numel(), 1)
    return 0, numel, numel


def place(param: Tensor) -> Place:
    """Where this rank's part lies in the whole parameter.

    Raises:
        RefusedError: a part whose elements no first, run and stride gives.
    """
    if not is_split(param):
        return whole(param)
    return _place(tuple(param.shape), param.device_mesh, param.placements)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _place(shape: tuple[int, ...], mesh: Any, placements: Any) -> Place:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    if math.prod(part) == 0:
        return 0, 1, 1
    first = sum(o * math.prod(shape[d + 1 :]) for d, o in enumerate(offset))
    last = max((d for d in range(len(shape)) if part[d] != shape[d]), default=0)
    # Rows of dimensions before the last split one follow each other only where they are whole.
    outer = [d for d in range(1, last) if part[d] != shape[d]]
    if any(math.prod(part[:d]) > 1 for d in outer):
        raise RefusedError(
            f"stochastic_rounding: expected a parameter split in its first dimension and one other "
            f"at most; got {placements} of shape {list(shape)} (stochastic_rounding=False or "
            "master_weights=True serve it)"
        )
    run = math.prod(part[last:])
    return first, run, max(run, math.prod(shape[last:]))


def check_blocks(param: Tensor) -> None:
    """Raise unless no block of 8-bit states is split between ranks.

    Raises:
        RefusedError: a split inside a row, but for one after whole blocks.
    """
    if not is_split(param):
        return
    from torch.distributed.tensor import Shard

    shape, leading = tuple(param.shape), states.leading_of(param.shape)
    inner = math.prod(shape[leading + 1 :])
    blocks = states.scales_shape(shape)[-1]
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):  # type: ignore[attr-defined]
        dim = getattr(placement, "dim", None)
        if dim is None or dim < leading:
            continue
        by_rank = [-(-blocks // size) * states.BLOCK, -(-shape[leading] // size) * inner]
        alone = sum(getattr(p, "dim", None) == dim for p in param.placements) == 1  # type: ignore[attr-defined]
        if not (dim == leading and type(placement) is Shard and alone and by_rank[0] == by_rank[1]):
            raise RefusedError(
                f"eight_bit: expected a parameter split between rows (dimensions below {leading}) "
                f"or after whole blocks of {states.BLOCK}; got {placement} of shape {list(shape)} "
                f"over {size} ranks (give it a group with eight_bit=False)"
            )
