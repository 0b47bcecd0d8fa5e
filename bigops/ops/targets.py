"""Which devices the kernels for GPUs serve, and the reason where they do not."""

from __future__ import annotations

import functools
import re

import torch

from bigops.backend import machine
from bigops.ops import tuned

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


def is_cpu(target: Target) -> bool:
    """Whether a target is a CPU, by its name: only dispatch on a GPU asks for a device."""
    return target == "cpu"


def cuda_arch(target: Target) -> str | None:
    """The architecture for which the CUDA C++ kernels were built on ``target``, or None.

    A device, and "cuda", must be able to run them here; an architecture need not be present.
    """
    if isinstance(target, torch.device) or target == "cuda":
        if machine.cuda_error or (target == "cuda" and not torch.cuda.is_available()):
            return None
        target = present(target)
    return target if machine.cuda_runs_on(target) else None


def cuda_built_for(target: Target) -> bool:
    """Whether the CUDA C++ kernels have code for ``target``, and serve where it is a device."""
    return cuda_arch(target) is not None


def why_not(dtype: torch.dtype, target: Target, op: str) -> str:
    """The reason why no Triton kernel of ``op`` serves a dtype on ``target``, or "".

    ``op`` is the one whose config files are read, "fused_linear" for loss and optimiser steps.

    Raises:
        ValueError: "cuda" where torch sees no GPU, or a name of no architecture.
    """
    if machine.triton_error():
        return machine.triton_error()
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


def named(device: str | None, x: torch.Tensor) -> Target:
    """The target that ``explain`` means: the one that is named, else that of x; meta is the CPU."""
    return device or ("cpu" if x.device.type == "meta" else x.device.type)
