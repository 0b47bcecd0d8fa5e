"""Which arguments `attention` takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops.formats import checks


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Any) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    for name, given in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, given)
    checks.tensors(q=q, k=k, v=v, mask=mask)
    checks.floating("q", q)
    for name, given in (("q", q), ("k", k), ("v", v)):
        checks.dims(name, given, 4)
        checks.like(name, given, q, "q")
    b, heads, t, d = q.shape
    own, s = k.shape[1], k.shape[2]
    checks.shape("k", k, [b, own, s, d])
    if checks.differ(heads % own, 0) if own else heads:
        raise ValueError(f"k: expected heads that divide the {heads} of q; got {own}")
    checks.shape("v", v, [b, own, s, v.shape[3]])
    if scale is not None and not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"scale: expected a number or None; got {type(scale).__name__}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        checks.floating("mask", mask, (torch.bool, *checks.FLOATING))
    checks.device("mask", mask, q, "q")
    full = (b, heads, t, s)
    fits = mask.dim() <= 4 and not any(
        checks.differ(size, whole) and checks.differ(size, 1)
        for size, whole in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: expected one that broadcasts to {list(full)}; got {list(mask.shape)}"
        )
