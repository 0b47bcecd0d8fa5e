"""Which kernel serves a call of fused_linear.

The CPU kernels register themselves (csrc/cpu/fused_linear.cpp).
"""

from __future__ import annotations

from torch import Tensor

from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.family import Call
from bigops.ops.fused_linear import triton
from bigops.ops.targets import Target

NAME = "fused_linear"


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    if targets.is_cpu(target):
        (n, k), x = call.weight.shape, checks.short(call.x.dtype)
        return on_cpu(NAME, lambda extension: extension.choose_fused_linear(call.rows, n, k, x))
    if why := targets.why_not(call.x.dtype, target, NAME):
        return reference(NAME, why)
    return Choice(NAME, triton.name(call), lambda: triton.said(call, target), triton.forward)


def backward(
    grad: Tensor, call: Call, preact: Tensor | None, **needs: bool
) -> tuple[Tensor, ...] | None:
    """The gradients of a call by a kernel on x's device, or None."""
    if targets.why_not(call.x.dtype, call.x.device, NAME):
        return None
    return triton.backward(grad, call, preact, **needs)
