"""Which kernel serves a call of fp8_linear.

On a GPU, Triton, backward included. On the CPU the reference: no instruction set that the CPU
kernels are built for multiplies e4m3.
"""

from __future__ import annotations

from torch import Tensor

from bigops.formats.fp8 import Fp8Weight
from bigops.ops import targets
from bigops.ops.choice import Choice, reference
from bigops.ops.family import Call
from bigops.ops.fp8_linear import triton
from bigops.ops.targets import Target

NAME = "fp8_linear"


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    weight = call.weight
    assert isinstance(weight, Fp8Weight)
    if targets.is_cpu(target):
        why = "no CPU kernel for e4m3: plain torch multiplies by the dequantised weight"
        return reference(NAME, why)
    if reason := targets.why_not(call.x.dtype, target, NAME):
        return reference(NAME, reason)
    return Choice(
        NAME,
        triton.name(call, weight),
        lambda: triton.said(call, weight, target),
        triton.forward,
    )


def backward(grad: Tensor, call: Call, **needs: bool) -> tuple[Tensor, ...] | None:
    """The gradients of a call by a kernel on x's device, or None."""
    if targets.why_not(call.x.dtype, call.x.device, NAME):
        return None
    return triton.backward(grad, call, **needs)
