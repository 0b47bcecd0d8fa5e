"""Dropout's masks kept as one byte an element, where autograd keeps a float."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORTH = 4096  # elements; a smaller tensor is kept as it is
SAMPLE = 256  # elements that are looked at first


class _Mask(NamedTuple):
    """A tensor that is 0 or ``value`` everywhere."""

    where: Tensor  # bool
    value: Tensor  # 0-dim


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def masks_in_bytes() -> AbstractContextManager[Any]:
    """Inside, what autograd saves for the backward pass and is 0 or one number everywhere, as the
    masks that dropout draws on the CPU, is kept as bool. Values come back to the bit."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(t: Tensor) -> _Mask | _Kept:
    return _mask(t) or _Kept(t, t._version)


def _mask(t: Tensor) -> _Mask | None:
    if type(t) is not Tensor or t.requires_grad or not t.is_floating_point():
        return None
    if t.numel() < WORTH or t.element_size() == 1 or not t.is_contiguous():
        return None
    with torch.no_grad():
        some = t.view(-1)[:SAMPLE]
        value = some.amax()
        if not bool(((some == 0) | (some == value)).all()) or not bool(value > 0):
            return None
        where = t != 0
        zero = torch.zeros((), dtype=t.dtype, device=t.device)
        return _Mask(where, value) if torch.equal(t, torch.where(where, value, zero)) else None


def _unpack(kept: _Mask | _Kept) -> Tensor:
    if isinstance(kept, _Mask):
        zero = torch.zeros((), dtype=kept.value.dtype, device=kept.value.device)
        return torch.where(kept.where, kept.value, zero)
    if kept.tensor._version != kept.version:  # autograd's own check is off where it asks hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {list(kept.tensor.shape)} is at version {kept.tensor._version}; expected "
            f"version {kept.version} instead"
        )
    return kept.tensor
