"""Which kernel serves a call, asked without making it: `bigops.explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bigops.ops.choice import Choice

choosers: dict[str, Callable[..., Choice]] = {}


def serves(op: str) -> Callable[[Callable[..., Choice]], Callable[..., Choice]]:
    """Register the function that answers `explain` for ``op`` (each op's file has one)."""

    def register(chooser: Callable[..., Choice]) -> Callable[..., Choice]:
        choosers[op] = chooser
        return chooser

    return register


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(n) is int for n in value)


def _of_shape(value: Any, dtype: torch.dtype | None) -> Any:
    """A shape becomes a tensor of ``dtype`` on the meta device; so in a list of them."""
    if isinstance(value, list):
        return [_of_shape(item, dtype) for item in value]
    if not _is_shape(value):
        return value
    if dtype is None:
        raise ValueError(f"dtype: expected a torch.dtype for the shape {value}; got none")
    return torch.empty(value, dtype=dtype, device="meta")


def explain(op: str, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Choice:
    """Say which kernel a call of ``op`` with these arguments takes, its config and the reason.

    Args:
        op: name of an op, as in `report()["ops"]`.
        *args, **kwargs: as for the op's public function; tensors may live on the "meta" device,
            and a shape, a tuple of ints, stands for a floating tensor of ``dtype``:
            ``explain("fused_linear", (64, 4096), (11008, 4096), dtype=torch.bfloat16,
            device="sm_90")``. Weights in a format of their own are given as they are.
        dtype: of what is given as a shape.
        device: optional; "cpu", "cuda" or an architecture such as "sm_90" or "gfx942", which
            need not be present.

    Raises:
        ValueError: unknown op, arguments that the op refuses, or a shape without ``dtype``.
    """
    if op not in choosers:
        raise ValueError(f"op: expected one of {', '.join(sorted(choosers))}; got {op!r}")
    given = [_of_shape(value, dtype) for value in args]
    return choosers[op](*given, **{name: _of_shape(v, dtype) for name, v in kwargs.items()})
