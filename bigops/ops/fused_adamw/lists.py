"""Checks of the lists that an optimiser step takes: each error names the list and the index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.ops.fused_adamw import states


def tensors(
    name: str,
    given: Sequence[Tensor],
    params: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] = (),
    optional: bool = False,
) -> None:
    """One tensor for each parameter, of its shape and device; a list may be left out if optional.

    In an optional list an empty tensor says that this parameter has none.
    """
    if len(given) != len(params) and not (optional and not given):
        raise ValueError(f"{name}: expected {len(params)} tensors as params has; got {len(given)}")
    for i, (t, param) in enumerate(zip(given, params, strict=False)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}]: expected a torch.Tensor; got {type(t).__name__}")
        if optional and t.numel() == 0:
            continue
        if t.layout != torch.strided:
            raise ValueError(f"{name}[{i}]: expected a dense tensor; got layout {t.layout}")
        if dtypes and t.dtype not in dtypes:
            checks.floating(f"{name}[{i}]", t, dtypes)
        if t.shape != param.shape:
            checks.shape(f"{name}[{i}]", t, param.shape)
        if t.device != param.device:
            raise ValueError(f"{name}[{i}]: expected device {param.device}; got {t.device}")


def moments(
    name: str, given: Sequence[Tensor], scales: Sequence[Tensor], params: Sequence[Tensor]
) -> None:
    tensors(name, given, params)
    if scales and len(scales) != len(params):
        raise ValueError(f"scales of {name}: expected {len(params)} tensors; got {len(scales)}")
    for i, (state, param) in enumerate(zip(given, params, strict=True)):
        coded = state.dtype == torch.uint8 and param.dtype != torch.float64
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        if state.dtype != (torch.uint8 if coded else wide):
            checks.dtype(f"{name}[{i}]", state, torch.uint8 if coded else wide)
        if not coded:
            continue
        if not scales:
            raise ValueError(f"scales of {name}: expected one tensor for each of params; got none")
        checks.dtype(f"scales of {name}[{i}]", scales[i], torch.float32)
        if not states.fits(scales[i], param.shape):
            checks.shape(f"scales of {name}[{i}]", scales[i], states.scales_shape(param.shape))
        if not (state.is_contiguous() and scales[i].is_contiguous()):
            raise ValueError(f"{name}[{i}]: expected contiguous codes; got another layout")


def step_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    copies: Sequence[Tensor],
    streams: Sequence[int],
    places: Sequence[tuple[int, int, int]],
) -> None:
    tensors("params", params, params, checks.FLOATING)
    tensors("grads", grads, params, checks.FLOATING)
    tensors("copies", copies, params, (torch.bfloat16, torch.float16), optional=True)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if (param.dtype == torch.float64) != (grad.dtype == torch.float64):
            raise TypeError(
                f"grads[{i}]: expected dtype float64 where the parameter has it and nowhere else; "
                f"got {checks.short_name(grad.dtype)} for {checks.short_name(param.dtype)}"
            )
        if copies and copies[i].numel() and param.dtype == torch.float64:
            raise TypeError(f"copies[{i}]: expected none of a parameter of float64; got one")
        if param.device != params[0].device:
            raise ValueError(f"params[{i}]: expected device {params[0].device}; got {param.device}")
    for name, given in (("streams", streams), ("places", places)):
        if given and len(given) != len(params):
            raise ValueError(f"{name}: expected none or {len(params)}; got {len(given)}")
    for i, (first, run, stride) in enumerate(places):
        numel = params[i].numel()
        if numel and not (first >= 0 and 0 < run <= stride and numel % run == 0):
            raise ValueError(
                f"places[{i}]: expected first, run and stride of {numel} elements in whole runs; "
                f"got {(first, run, stride)}"
            )


def check_norm(norm: Tensor | None, clip_norm: float, params: Sequence[Tensor]) -> None:
    """The norm that a step looks at, and the largest one that it lets through."""
    if not clip_norm > 0:
        raise ValueError(f"clip_norm: expected a number above 0; got {clip_norm}")
    if norm is None:
        if clip_norm != math.inf:
            raise ValueError(f"norm: expected that of grads, to clip them to {clip_norm}; got None")
        return
    checks.tensors(norm=norm)
    checks.dtype("norm", norm, torch.float64)
    checks.shape("norm", norm, [])
    if params and norm.device != params[0].device:
        raise ValueError(f"norm: expected device {params[0].device}; got {norm.device}")
