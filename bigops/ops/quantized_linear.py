"""quantized_linear: y = act(x W^T + bias) + residual, W int8 or int4, x in floating point or u8.

Reference, op (schema, fake, autograd, vmap come from `_frozen`), dispatch, public function, in
that order; the storage and its conversion are in `_quantized_weight`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.ops import _activation as act
from bigops.ops import _checks as checks
from bigops.ops import _frozen
from bigops.ops import _quantize as quantize
from bigops.ops._quantized_weight import (
    TILE,
    QuantizedWeight,
    check_storage,
    quantize_weight,
)

__all__ = ["QuantizedWeight", "quantize_weight", "quantized_linear", "reference"]

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    row_sum: Tensor | None,
    x_grid: Tensor | None,
    pad: int,
    k: int,
    bits: int,
    group: int,
    activations: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `quantized_linear` in plain torch; the storage as in `QuantizedWeight`."""
    weight = QuantizedWeight.of(
        values, scale, zero_point, row_sum, x_grid, pad, k, bits, group, activations
    )
    if activations == "none":
        z = F.linear(x.float(), weight.to_dense())
    else:
        rows = quantize.quantize_rows(x, activations, x_grid)
        whole = (rows.q - rows.zero_point).double()
        if bits == 8:
            # whole numbers below 2^53: the product is exact, in whatever order it is summed
            q, by, zero = weight.grid()
            total = torch.matmul(whole, (q if zero is None else q - zero).double().t()).float()
            z = total * (rows.scale * by[:, 0])
        else:
            dense = weight.to_dense(torch.float64)
            z = torch.matmul(whole, dense.t()).float() * rows.scale
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(x: Tensor, *fixed: object) -> Tensor:
    return QuantizedWeight.of(*fixed).to_dense()


def check(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    row_sum: Tensor | None,
    x_grid: Tensor | None,
    pad: int,
    k: int,
    bits: int,
    group: int,
    activations: str,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    checks.dims("values", values, 4)
    n = values.shape[0] * TILE - pad
    if not (0 <= pad < TILE and n >= 0):
        raise ValueError(f"pad: expected the rows that fill up the last tile of {TILE}; got {pad}")
    check_storage(values, scale, zero_point, row_sum, x_grid, n, k, bits, group, activations)
    checks.device("values", values, x)
    _frozen.check_call(x, n, k, bias, residual, activation, quantize.SERVED)


# --- op ------------------------------------------------------------------------------------


class _QuantizedLinear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *fixed: object) -> int:
        values, pad = fixed[0], fixed[5]
        assert isinstance(values, Tensor)
        assert isinstance(pad, int)
        return values.shape[0] * TILE - pad


_op = _QuantizedLinear(
    "quantized_linear",
    "Tensor values, Tensor scale, Tensor? zero_point, Tensor? row_sum, Tensor? x_grid, "
    "int pad, int k, int bits, int group, str activations",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *fixed: fixed[-1] != "none",
)
reference_backward = _op.reference_backward


# --- dispatch ------------------------------------------------------------------------------


@backend.serves("quantized_linear")
def _explain(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> backend.Explanation:
    _op.check(x, *weight.arguments, bias, residual, activation)
    extension = backend.extension

    def choose() -> tuple[str, str]:
        return extension.choose_quantized_linear(  # type: ignore
            weight.bits, weight.activations, checks.short(x.dtype)
        )

    return _frozen.explain("quantized_linear", x, device, choose if extension else None)


# --- public function -----------------------------------------------------------------------


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in int8 or int4.

    What happens to x is part of the weight (`quantize_weight`): it stays in floating point, or
    each row becomes u8 and the products are whole numbers. Sums of int8 by u8 are exact; groups
    are summed by themselves and added up in float32, as is the epilogue. A row of x with NaN or
    inf gives a row of NaN where x is quantised.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides.
        weight: `quantize_weight` of a ``[N, K]`` matrix; it has no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.

    Returns:
        ``[.., N]`` in x's dtype. Gradients for x, bias and residual are the straight-through
        ones: those of the linear layer with the dequantised weight. Under `torch.autocast` x,
        bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, or a weight
            that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    return _op.apply(x, *weight.arguments, bias, residual, activation)
