"""Which kernels serve the optimiser steps, for dispatch and for `bigops.explain`.

The CPU kernels register themselves (csrc/cpu/fused_adamw.cpp). GPUs take the CUDA C++ kernels
where built, else Triton's, which also serve SGD; float64 and other devices take the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bigops.backend import machine
from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.fused_adamw import cuda, reference, triton
from bigops.ops.fused_adamw.schema import AdamWStep, SGDStep
from bigops.ops.library import LIB

_NORM_DTYPES = (torch.float32,)  # that of a sum: kernels of norms take gradients of any dtype


def choose(
    op: str,
    dtypes: Collection[torch.dtype],
    target: targets.Target,
    counters: Collection[torch.device] = (),
) -> tuple[ModuleType, str]:
    """(which module's kernels serve ``op`` on a GPU, and why).

    Args:
        op: "fused_adamw", "fused_sgd" or "fused_grad_norm".
        dtypes: of the parameters.
        target: as in `targets.why_not`.
        counters: the devices that the counters of steps are on.
    """
    if len(counters) < 2 and cuda.serves(op, dtypes, target):
        return cuda, "one launch for 256 tensors of any dtypes"
    for dtype in dtypes:
        why = targets.why_not(dtype, target, "fused_linear")  # whose files hold their block
        if why:
            return reference, why
    return triton, "one launch for all tensors of the same dtypes"


def adamw(*args: Any) -> None:
    """The op `fused_adamw` as a GPU takes it."""
    step, kernels = AdamWStep(*args), reference
    if len(step.params):
        dtypes, counters = {p.dtype for p in step.params}, {s.device for s in step.steps}
        kernels, _ = choose("fused_adamw", dtypes, step.params[0].device, counters)
    kernels.adamw(step)


def sgd(*args: Any) -> None:
    """The op `fused_sgd` as a GPU takes it."""
    step, kernels = SGDStep(*args), reference
    if len(step.params):
        dtypes = {p.dtype for p in step.params}
        kernels, _ = choose("fused_sgd", dtypes, step.params[0].device)
    kernels.sgd(step)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The op `fused_grad_norm` as a GPU takes it."""
    kernels = reference
    if len(grads):
        kernels, _ = choose("fused_grad_norm", _NORM_DTYPES, grads[0].device)
    return kernels.norm(grads)  # type: ignore[no-any-return]


def _explain(
    op: str, params: Sequence[Tensor], *, eight_bit: bool = False, device: str | None = None
) -> Choice:
    dtype = params[0].dtype if len(params) else torch.float32
    if len(params):
        checks.floating("params[0]", params[0])
    target = device or (params[0].device.type if len(params) else "cpu")
    form = "double" if op == "fused_grad_norm" else "8bit" if eight_bit else "fused"
    name = f"{op}.{checks.short(dtype)}.{form}"
    if target not in ("cpu", "meta"):
        kernels, reason = choose(op, _NORM_DTYPES if form == "double" else (dtype,), target)
        if kernels is reference:
            return Choice.of(op, f"reference.{op}", reason)
        language = "cuda" if kernels is cuda else "triton"
        return Choice.of(op, f"{language}.{name}", reason)
    if machine.extension is None:
        return Choice.of(op, f"reference.{op}", machine.extension_error)
    isa = "portable" if dtype == torch.float64 else machine.extension.isa()
    level = isa if isa in ("portable", "avx2") else "avx512"  # whose extensions add nothing
    return Choice.of(op, f"cpu.{level}.{name}", "one kernel for all sizes; memory binds")


for _op, _gpu in (("fused_adamw", adamw), ("fused_sgd", sgd), ("fused_grad_norm", norm)):
    LIB.impl(_op, _gpu, "CUDA")
    serves(_op)(functools.partial(_explain, _op))
