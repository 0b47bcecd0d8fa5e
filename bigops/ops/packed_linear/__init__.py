"""packed_linear: y = act(x W^T + bias) + residual with a dense W that lies as the kernels read it.

For inference: packing costs a pass over the weight, whose place the panels take.
"""

from __future__ import annotations

from torch import Tensor

from bigops.formats import checks
from bigops.formats.packed import PackedWeight
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.explain import serves
from bigops.ops.family import Call, LinearOp
from bigops.ops.targets import Target

__all__ = ["packed_linear"]


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``; csrc/cpu/packed_linear.cpp registers itself."""
    if not targets.is_cpu(target):
        return reference("packed_linear", "packed_linear has no GPU kernel yet; plain torch serves")
    x = checks.short(call.x.dtype)
    return on_cpu("packed_linear", lambda extension: extension.choose_packed_linear(call.rows, x))


op = LinearOp("packed_linear", PackedWeight, choose=choose)
serves("packed_linear")(op.explain)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with a packed dense W, for inference.

    Args:
        x: ``[.., K]`` in the weight's dtype, any strides.
        weight: `PackedWeight.from_dense` of a ``[N, K]`` matrix; it has no gradient, and follows no
            later change of that matrix.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.

    Returns:
        ``[.., N]`` in x's dtype; sums and epilogue are held in float32. Gradients for x, bias and
        residual come from a library's product with the unpacked weight. Under `torch.autocast` x,
        bias and residual are cast to the weight's dtype: it was packed for that one.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, or a weight
            that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    checks.stored(weight, PackedWeight)
    return op.run(x, weight.arguments, weight.k, bias, residual, activation)
