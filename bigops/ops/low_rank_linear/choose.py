"""Which kernel serves a call of low_rank_linear with floating factors.

The CPU kernels register themselves (csrc/cpu/low_rank_linear.cpp).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigops.formats import checks
from bigops.formats.dense import Factors
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.family import Call
from bigops.ops.low_rank_linear import triton
from bigops.ops.targets import Target

NAME = "low_rank_linear"


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    if targets.is_cpu(target):
        return on_cpu(NAME, lambda extension: _on_cpu(extension, call))
    if why := targets.why_not(call.x.dtype, target, NAME):
        return reference(NAME, why)
    kernel = triton.name(call, triton.form(call, target))
    return Choice(NAME, kernel, lambda: triton.said(call, target), triton.forward)


def _on_cpu(extension: Any, call: Call) -> tuple[str, str]:
    weight, dtype = call.weight, checks.short(call.x.dtype)
    assert isinstance(weight, Factors)
    inner, _ = extension.choose_fused_linear(call.rows, weight.rank, weight.k, dtype)
    outer, reason = extension.choose_fused_linear(call.rows, weight.n, weight.rank, dtype)
    first, last = (name.rpartition(".")[2] for name in (inner, outer))
    kernel = outer.replace("fused_linear", NAME)
    return kernel, f"x v^T by {first}, then u by {last}: {reason}"


def backward(
    grad: Tensor, call: Call, t: Tensor, preact: Tensor | None, **needs: bool
) -> tuple[Tensor, ...] | None:
    """The gradients of a call by kernels on x's device, or None."""
    if targets.why_not(call.x.dtype, call.x.device, NAME):
        return None
    return triton.backward(grad, call, t, preact, **needs)
