"""Which kernel serves a call of quantized_linear.

The CPU kernels register themselves (csrc/cpu/quantized_linear.cpp). On a GPU, Triton serves, but
for the few rows of a decode step, where W is all that is read and its bytes can go from memory to
the tensor cores by a shorter way than Triton knows; the backward is Triton's, and a u8 x or y is
served by the reference, as `backend.record` says.
"""

from __future__ import annotations

from torch import Tensor

from bigops.formats import checks
from bigops.formats.quantized import QuantizedWeight
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.family import Call, U8Call
from bigops.ops.quantized_linear import cuda, triton
from bigops.ops.targets import Target

NAME = "quantized_linear"


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    weight = call.weight
    assert isinstance(weight, QuantizedWeight)
    if targets.is_cpu(target):
        return _on_cpu(call, weight, False)
    if cuda.serves(call, weight, target):
        return Choice(NAME, cuda.name(call, weight), lambda: cuda.said(call, weight), cuda.forward)
    if reason := triton.why_not(call, weight, target):
        return reference(NAME, reason)
    return Choice(
        NAME,
        triton.name(call, weight),
        lambda: triton.said(call, weight, target),
        triton.forward,
    )


def choose_u8(given: U8Call, target: Target) -> Choice:
    """The kernel that serves a call whose x or result is u8."""
    weight = given.call.weight
    assert isinstance(weight, QuantizedWeight)
    if targets.is_cpu(target):
        return _on_cpu(given.call, weight, given.y_qparams is not None)
    number = "result" if given.y_qparams is not None else "x"
    return reference(NAME, f"no Triton kernel for a uint8 {number}", f"{NAME}_u8")


def _on_cpu(call: Call, weight: QuantizedWeight, to_u8: bool) -> Choice:
    return on_cpu(
        NAME,
        lambda extension: extension.choose_quantized_linear(
            call.rows,
            weight.bits,
            weight.group,
            weight.activations,
            checks.short(call.x.dtype),
            to_u8,
        ),
    )


def backward(grad: Tensor, call: Call, **needs: bool) -> tuple[Tensor, ...] | None:
    """The gradients of a call by a kernel on x's device, or None."""
    assert isinstance(call.weight, QuantizedWeight)
    if triton.why_not(call, call.weight, call.x.device):
        return None
    return triton.backward(grad, call, **needs)
