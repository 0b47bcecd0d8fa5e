"""fp8_linear: y = act(x W^T + bias) + residual, W in float8_e4m3fn, x floating or e4m3fn."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, fp8
from bigops.formats.fp8 import Fp8Weight
from bigops.formats.quantize import Rows
from bigops.ops.explain import serves
from bigops.ops.family import Call, LinearOp
from bigops.ops.fp8_linear.choose import backward, choose

__all__ = ["fp8_linear"]


def _product(call: Call, seen: Rows | None) -> Tensor:
    x, weight = call.x, call.weight
    assert isinstance(weight, Fp8Weight)
    if not weight.rounds:
        return F.linear(x.float(), weight.to_dense())
    if weight.scales == "block":
        return F.linear(fp8.act_quant(x, True).dense(), weight.to_dense())
    # scales after the sums, which no small scale makes 0
    rows = fp8.act_quant(x, False, weight.x_scale)
    return F.linear(rows.q, weight.values.float()[:, : weight.k]) * weight.scale[:, 0] * rows.scale


op = LinearOp("fp8_linear", Fp8Weight, _product, choose, backward)
serves("fp8_linear")(op.explain)


def fp8_linear(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in float8_e4m3fn.

    What happens to x is part of the weight (`Fp8Weight.from_dense`): it stays in floating point, or
    it is rounded to e4m3fn as well, by a scale for each row, for each 128 columns of a row, or one
    that was given; numbers past 448 scales become 448. The numbers are the same on every device,
    also where no unit multiplies them. Sums and epilogue are held in float32; in blocks the sums of
    each 128 columns are scaled by themselves (arXiv:2412.19437). A row of x with NaN or inf gives a
    row of NaN where x is rounded.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides.
        weight: `Fp8Weight.from_dense` of a ``[N, K]`` matrix; it has no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.

    Returns:
        ``[.., N]`` in x's dtype. Gradients for x, bias and residual are the straight-through ones:
        those of the linear layer with the dequantised weight. Under `torch.autocast` floating x,
        bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, or a weight
            that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    checks.stored(weight, Fp8Weight)
    return op.run(x, weight.arguments, weight.k, bias, residual, activation)
