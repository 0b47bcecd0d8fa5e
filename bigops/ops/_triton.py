"""The road from torch ops to the Triton kernels: flattens rows, names what ran, says why not."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.ops import _activation as act
from bigops.ops import _checks as checks
from bigops.ops import _triton_tuned as tuned
from bigops.ops._library import rows

LEAST_CAPABILITY = 80  # cp.async and mma of bf16, which the tiles are made for
Target = torch.device | str
"""A device, or "cuda", or an architecture such as "sm_90", which need not be present."""


def present(target: Target) -> str:
    """The architecture of a device, for "cuda" that of the current GPU; others as they are."""
    if isinstance(target, str):
        if target != "cuda":
            return target
        if not torch.cuda.is_available():
            raise ValueError(
                "device: torch sees no GPU here; expected an architecture such as sm_90; got 'cuda'"
            )
        target = torch.device("cuda", torch.cuda.current_device())
    return tuned.tiles.device_arch(target)


def why_not(dtype: torch.dtype, target: Target, op: str) -> str:
    """The reason why no Triton kernel of ``op`` serves a dtype on ``target``, or "".

    ``op`` is the one whose config files are read, "fused_linear" for loss and optimiser steps.

    Raises:
        ValueError: "cuda" where torch sees no GPU, or a name of no architecture.
    """
    if backend.triton_error():
        return backend.triton_error()
    if dtype == torch.float64:
        return "no Triton kernel for float64"
    return unserved(op, present(target))


def serves(dtype: torch.dtype, target: Target, op: str) -> bool:
    """Whether the Triton kernels of ``op`` serve a dtype on ``target``."""
    return not why_not(dtype, target, op)


@functools.cache
def unserved(op: str, arch: str) -> str:
    """The reason why no config file of ``op`` serves ``arch``, or "".

    Asked before the first call on a GPU, whose measured tiles are handed over on the way.

    Raises:
        ValueError: a name of no architecture.
    """
    old = re.fullmatch(r"sm_(\d+)", arch)
    if old is not None and int(old.group(1)) < LEAST_CAPABILITY:
        return f"no Triton kernel for {arch}: expected sm_{LEAST_CAPABILITY} or later"
    tuned.hand_over(arch)
    try:
        tuned.entries(op, arch)
    except ValueError as error:
        if str(error).startswith("arch: "):
            raise
        return f"a config file cannot serve: {error}"
    except KeyError as error:
        return f"no config file of {op} for {error.args[0]}"
    return ""


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    with_preact: bool,
) -> tuple[Tensor, Tensor | None]:
    """`kernels/fused_linear.py` forward on x of any rank: (y, z or None)."""
    from bigops.kernels import fused_linear as kernels

    flat = rows(x)
    y, z = kernels.forward(
        flat,
        weight,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
        with_preact,
    )
    backend.note(f"triton.fused_linear.{checks.short(x.dtype)}")
    lead = x.shape[:-1]
    return y.view(*lead, y.shape[-1]), None if z is None else z.view(*lead, z.shape[-1])


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    preact: Tensor | None,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels/fused_linear.py` backward on x of any rank; [0] for what is not needed."""
    from bigops.kernels import fused_linear as kernels

    flat_grad, flat_x = rows(grad), rows(x)
    gx, gw, gb = kernels.backward(
        flat_grad,
        flat_x,
        weight,
        None if preact is None else rows(preact),
        act.CODES[activation],
        need_x,
        need_weight,
        need_bias,
    )
    backend.note(f"triton.fused_linear_backward.{checks.short(x.dtype)}")
    return gx.view(x.shape) if need_x else gx, gw, gb


def explain(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, activation: str
) -> tuple[str, dict[str, Any], str]:
    """(kernel, config, reason) on ``target`` ("cuda", "sm_90", "gfx942" ...); n: weight rows."""
    from bigops.kernels import fused_linear as kernels

    config, reason = kernels.explain(target, dtype, m, n, k, act.CODES[activation])
    return f"triton.fused_linear.{checks.short(dtype)}", config, reason
