"""The torch library `bigops`: schemas are defined in Python, CPU kernels registered by csrc/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIB = torch.library.Library("bigops", "DEF")


def define(schema: str, reference: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define an op and serve it by its reference wherever no kernel is registered.

    `CompositeExplicitAutograd` is the weakest key: a kernel on "CPU" or "CUDA" goes before it.
    """
    name = schema.split("(", 1)[0]
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, reference, "CompositeExplicitAutograd")
    return getattr(torch.ops.bigops, name).default


def autocast(device_type: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast floating tensors to the active autocast dtype of ``device_type`` (float64 stays)."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t if t is None or t.dtype in (dtype, torch.float64) or not t.is_floating_point()
        else t.to(dtype)
        for t in tensors
    )  # fmt: skip


def rows(t: torch.Tensor) -> torch.Tensor:
    """[.., K] as [M, K]; reshape(-1, K) cannot, where K is 0."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def loop(
    function: Callable[..., Any], args: tuple[Any, ...], in_dims: tuple[Any, ...], batch: int
) -> Any:
    """A vmap rule: the function on each item of the batch, results stacked at 0."""
    outs = [
        function(
            *(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        )
        for i in range(batch)
    ]
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs)
    return tuple(torch.stack(parts) for parts in zip(*outs, strict=True))
