"""sparse_linear: y = act(x W^T + bias) + residual, W sparse with int8, bfloat16 or float32 values.

Any pattern is stored (unstructured, blocks of any shape, N:M: `SparseWeight`). 2:4 has a form of
its own for sparse tensor cores besides (`Sparse24Weight`, op in `sparse24`), and floating values
one of fewer bytes for decode steps on a GPU (`BitmapWeight`, op in `bitmap`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.quantize import QuantizedRows
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse24 import Sparse24Weight
from bigops.formats.sparse_layout import to_dense
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.family import Call, LinearOp, RowsOp, U8Op
from bigops.ops.sparse_linear import bitmap, sparse24
from bigops.ops.sparse_linear.choose import backward, choose, choose_rows, choose_u8

__all__ = ["sparse_linear"]


def _product(call: Call, seen: quantize.Rows | None) -> Tensor:
    x, weight = call.x, call.weight
    assert isinstance(weight, SparseWeight)
    w = to_dense(weight.values, weight.positions(), weight.n, weight.k, weight.chunk)
    if weight.scale is None:
        return F.linear(x.float(), w)
    seen = seen or quantize.act_quant(x)
    # whole numbers below 2^53: the product is exact, in whatever order it is summed
    total = torch.matmul((seen.q - seen.zero_point).double(), w.double().t()).float()
    return total * (seen.scale * weight.scale)


op = LinearOp("sparse_linear", SparseWeight, _product, choose, backward)
u8_op = U8Op(op, ("x_qparams", "y_qparams"), choose_u8)
rows_op = RowsOp(op, choose_rows)
OPS: dict[type[Format], LinearOp] = {
    SparseWeight: op,
    Sparse24Weight: sparse24.op,
    BitmapWeight: bitmap.op,
}


@serves("sparse_linear")
def _explain(x: Tensor, weight: Format, *args: Any, **kwargs: Any) -> Choice:
    checks.stored(weight, *OPS)
    return OPS[type(weight)].explain(x, weight, *args, **kwargs)


def sparse_linear(
    x: Tensor | QuantizedRows,
    weight: SparseWeight | Sparse24Weight | BitmapWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    x_qparams: Tensor | None = None,
    y_qparams: Tensor | None = None,
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W sparse; what is not stored costs nothing.

    With int8 values the rows of x are quantised at run time as in `quantized_linear` (a row with
    NaN or inf gives a row of NaN); floating values are multiplied in their precision and summed in
    float32.

    Qparams are float32 ``[2]``, scale and zero point of u8
    (`bigops.formats.quantize.static_qparams` makes them of a range). With ``y_qparams`` the result
    is rounded to u8 in the same pass, as `quantized_linear` says; calls with qparams are for
    inference.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides; bfloat16 with bfloat16 values. Or
            uint8 on ``x_qparams`` with int8 values; or, with those, `QuantizedRows` that
            `act_quant` made once for several products, without qparams and gradients.
        weight: a `SparseWeight` of a ``[N, K]`` matrix. Or, for the sparse tensor cores of sm_80 to
            sm_89, a `Sparse24Weight`: it takes no qparams, and x in the dtype of its floating
            values. NaN and infinity of x at zeros of W do not spread there. Or, for up to 16 rows
            of x on a GPU, a `BitmapWeight`: no qparams, x in its dtype, and it has no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        x_qparams: with int8 values the qparams of x, or None: those of each row, found at run time.
        y_qparams: the qparams of a uint8 result, or None.

    Returns:
        ``[.., N]``: uint8 with ``y_qparams``, else in x's dtype (of a uint8 x and of rows that of
        bias, without one of residual, without both float32). Gradients for x, bias and residual are
        those of the linear layer with the dequantised weight (straight through the rounding of x).
        Floating values that require it get theirs, at the stored positions only. Under
        `torch.autocast` x, bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, storage other
            than floating values that requires a gradient, qparams that are none, or with qparams
            anything that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: storage whose contents are broken (`SparseWeight.validate` says where), or NaN
            or inf in a y that was to become uint8.
    """
    checks.stored(weight, *OPS)
    serving = OPS[type(weight)]
    if isinstance(x, QuantizedRows):
        given = (weight.arguments, weight.k, bias, residual, activation, x_qparams, y_qparams)
        return serving.on_rows(x, *given)
    if serving.by_itself(x, weight, x_qparams, y_qparams):
        return serving.run(x, weight.arguments, weight.k, bias, residual, activation)
    qparams = (x_qparams, y_qparams)  # of a `SparseWeight`, whose op alone has a form for u8
    return u8_op(x, weight.arguments, weight.k, qparams, bias, residual, activation)
