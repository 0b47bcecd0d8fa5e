"""quantized_linear: y = act(x W^T + bias) + residual, W int8 per row, x quantised at run time.

Reference, op (schema, fake, autograd, vmap come from `_frozen`), conversion, dispatch, public
function, in that order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops import backend
from bigops.ops import _activation as act
from bigops.ops import _checks as checks
from bigops.ops import _frozen
from bigops.ops import _quantize as quantize

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `quantized_linear` in plain torch; weight int8 [N, K], scale float32 [N]."""
    rows = quantize.quantize_rows(x)
    # whole numbers below 2^53: the product is exact, in whatever order it is summed
    total = torch.matmul((rows.q - rows.zero_point).double(), weight.double().t()).float()
    z = total * (rows.scale * scale)
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float() * scale.unsqueeze(1)


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    checks.matrix("weight", weight)
    checks.dtype("weight", weight, torch.int8)
    checks.device("weight", weight, x)
    n, k = weight.shape
    _frozen.check_call(x, n, k, bias, residual, activation, quantize.SERVED)
    checks.shape("scale", scale, [n])
    checks.dtype("scale", scale, torch.float32)
    checks.device("scale", scale, x)


# --- op ------------------------------------------------------------------------------------


class _QuantizedLinear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *storage: Tensor | None) -> int:
        weight = storage[0]
        assert weight is not None
        return weight.shape[0]


_op = _QuantizedLinear(
    "quantized_linear",
    "Tensor weight, Tensor scale",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *storage: True,
)
reference_backward = _op.reference_backward


# --- conversion ----------------------------------------------------------------------------


class QuantizedWeight(NamedTuple):
    """An int8 weight as it is stored and saved: row n of the matrix is ``scale[n] * values[n]``."""

    values: Tensor  # [N, K] int8, -127..127
    scale: Tensor  # [N] float32

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for."""
        return (self.values.float() * self.scale.unsqueeze(1)).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return self.values.nbytes + self.scale.nbytes

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the storage is whole (asked when a file loads)."""
        checks.tensors(values=self.values, scale=self.scale)
        checks.matrix("values", self.values)
        checks.dtype("values", self.values, torch.int8)
        checks.shape("scale", self.scale, [self.values.shape[0]])
        checks.dtype("scale", self.scale, torch.float32)
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError("scale: expected finite values above 0")


def quantize_weight(w: Tensor) -> QuantizedWeight:
    """Round a matrix to int8 with one symmetric scale per row (largest magnitude -> 127).

    Args:
        w: ``[N, K]``, any floating dtype.

    Raises:
        ValueError: w is no matrix, or holds NaN or inf.
        TypeError: w is no floating tensor.
    """
    quantize.check_weight(w)
    w = w.detach()
    scale = quantize.row_scales(w)
    return QuantizedWeight(quantize.to_int8(w, scale.unsqueeze(1)).contiguous(), scale)


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
    values, scale = weight
    check(x, values, scale, bias, residual, activation)
    n, k = values.shape
    m = x.numel() // k if k else x.shape[:-1].numel()
    extension = backend.extension

    def choose() -> tuple[str, str]:
        return extension.choose_quantized_linear(m, n, k, checks.short(x.dtype))  # type: ignore

    return _frozen.explain("quantized_linear", x, device, choose if extension else None)


# --- public function -----------------------------------------------------------------------


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in int8 and x quantised row by row at run time.

    Each row of x becomes u8 with its own scale and zero point, sums are exact int32, and the
    epilogue is held in float32. A row of x with NaN or inf gives a row of NaN.

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
    values, scale = weight
    return _op.apply(x, values, scale, bias, residual, activation)
