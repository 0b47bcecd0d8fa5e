"""quantized_linear: y = act(x W^T + bias) + residual, W int8 or int4, x in floating point or u8."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.quantize import QuantizedRows
from bigops.formats.quantized import QuantizedWeight
from bigops.ops.explain import serves
from bigops.ops.family import Call, LinearOp, RowsOp, U8Op
from bigops.ops.quantized_linear.choose import backward, choose, choose_rows, choose_u8

__all__ = ["quantized_linear"]


def _product(call: Call, seen: quantize.Rows | None) -> Tensor:
    weight = call.weight
    assert isinstance(weight, QuantizedWeight)
    if not weight.rounds:
        return torch.nn.functional.linear(call.x.float(), weight.to_dense())
    rows = seen or quantize.act_quant(call.x, weight.activations, weight.x_qparams)
    whole = (rows.q - rows.zero_point).double()
    if weight.bits == 8:
        # whole numbers below 2^53: the product is exact, in whatever order it is summed
        q, by, zero = weight.codes()
        total = torch.matmul(whole, (q if zero is None else q - zero).double().t()).float()
        return total * (rows.scale * by[:, 0])
    return torch.matmul(whole, weight.to_dense(torch.float64).t()).float() * rows.scale


op = LinearOp("quantized_linear", QuantizedWeight, _product, choose, backward)
u8_op = U8Op(op, ("y_qparams",), choose_u8)
rows_op = RowsOp(op, choose_rows)
serves("quantized_linear")(op.explain)


def quantized_linear(
    x: Tensor | QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    y_qparams: Tensor | None = None,
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in int8 or int4.

    What happens to x is part of the weight (`QuantizedWeight.from_dense`): it stays in floating
    point, or each row becomes u8 and the products are whole numbers. Sums of int8 by u8 are exact;
    groups are summed by themselves and added up in float32, as is the epilogue. A row of x with NaN
    or inf gives a row of NaN where x is quantised.

    With ``y_qparams`` the result is rounded in the same pass and stored as u8, which the next layer
    reads as it is: ``clamp(rint(y * (1 / scale)) + zero_point, 0, 255)``, in float32 just what that
    layer would make of a float32 y by its static qparams.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides. Or uint8, on the weight's own
            ``x_qparams``, with activations "static"; or `QuantizedRows` that `act_quant` made once
            for several products, with "dynamic" or "symmetric", without y_qparams and gradients.
        weight: `QuantizedWeight.from_dense` of a ``[N, K]`` matrix; it has no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        y_qparams: float32 ``[2]``, scale and zero point of a uint8 result (`static_qparams` makes
            them of a range, ``weight.x_qparams`` of the next layer is one), or None.

    Returns:
        ``[.., N]``: uint8 with ``y_qparams``, else in x's dtype (of a uint8 x and of rows that of
        bias, without one of residual, without both float32). Gradients for x, bias and residual are
        the straight-through ones: those of the linear layer with the dequantised weight. Under
        `torch.autocast` floating x, bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, a weight that
            requires a gradient, qparams that are none, or anything that requires a gradient where x
            or the result is uint8.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: NaN or inf in a y that was to become uint8: no number of it says that.
    """
    checks.stored(weight, QuantizedWeight)
    if isinstance(x, QuantizedRows):
        given = (weight.arguments, weight.k, bias, residual, activation, y_qparams)
        return op.on_rows(x, *given)
    if y_qparams is None and getattr(x, "dtype", None) is not torch.uint8:
        return op.run(x, weight.arguments, weight.k, bias, residual, activation)
    return u8_op(x, weight.arguments, weight.k, (y_qparams,), bias, residual, activation)
