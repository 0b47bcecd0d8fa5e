"""quantized_linear: y = act(x W^T + bias) + residual, W int8 or int4, x in floating point or u8.

Reference, op (schema, fake, autograd, vmap come from `bigops.ops.family`), dispatch, public
function, in that order; the storage and its conversion are in `bigops.formats.quantized`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.backend import machine
from bigops.formats import checks, quantize
from bigops.formats.quantize import static_grid
from bigops.formats.quantized import TILE, QuantizedWeight, check_storage, quantize_weight
from bigops.ops import activation as act
from bigops.ops import family as _frozen
from bigops.ops.explain import Explanation, serves
from bigops.ops.grid import GridLinear
from bigops.ops.library import register
from bigops.ops.quantized_linear import cuda as _decode
from bigops.ops.quantized_linear import triton as _triton

__all__ = [
    "QuantizedWeight",
    "quantize_weight",
    "quantized_linear",
    "reference",
    "reference_grid",
    "static_grid",
]

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
    fixed = (values, scale, zero_point, row_sum, x_grid, pad, k, bits, group, activations)
    return _compute(x, *fixed, x_grid, bias, residual, activation).to(x.dtype)


def _compute(x: Tensor, *args: Any) -> Tensor:
    *fixed, x_grid, bias, residual, activation = args
    weight = QuantizedWeight.of(*fixed)
    bits, activations = weight.bits, weight.activations
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
    return y


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
_grid = GridLinear(
    _op, ("y_grid",), compute=_compute, quantises=lambda *fixed: fixed[-1] == "static"
)
reference_grid = _grid.reference


# --- dispatch ------------------------------------------------------------------------------
# The CPU kernels register themselves (csrc/cpu/quantized_linear.cpp). On a GPU, Triton serves, but
# for the few rows of a decode step, where W is all that is read and its bytes can go from memory to
# the tensor cores by a shorter way than Triton knows; the backward is Triton's, and the twin with
# grids the reference, as `backend.record` says.


def _cuda(x, *args):  # type: ignore[no-untyped-def]
    k, activations = args[6], args[9]
    if _decode.serves(x, activations):
        check(x, *args)
        return _decode.forward(x, *args)
    if not _triton.serves(x.dtype, k, activations, x.device):
        return _op._serve(x, *args)
    check(x, *args)
    return _triton.forward(x, *args)


def _cuda_backward(grad, x, *args):  # type: ignore[no-untyped-def]
    k, activations = args[6], args[9]
    if not _triton.serves(x.dtype, k, activations, x.device):
        return _op._serve_backward(grad, x, *args)
    return _triton.backward(grad, x, *args)


register(_op.forward, cuda=_cuda)
register(_op.backward, cuda=_cuda_backward)


@serves("quantized_linear")
def _explain(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
    *,
    y_grid: Tensor | None = None,
) -> Explanation:
    checks.stored(weight, QuantizedWeight, "quantize_weight")
    if y_grid is None and x.dtype != torch.uint8:
        _op.check(x, *weight.arguments, bias, residual, activation)
    else:
        _grid.check(x, *weight.arguments, y_grid, bias, residual, activation)
    extension = machine.extension
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    if target != "cpu":
        m = x.shape[:-1].numel()
        if y_grid is None and _decode.serves_on(target, x.dtype, m, weight.activations):
            kernel, config, reason = _decode.explain(x.dtype, m, weight)
            return Explanation("quantized_linear", kernel, reason, config)
        reason = _triton.why_not(x.dtype, weight.k, weight.activations, target)
        if y_grid is not None:
            reason = "no Triton kernel for a uint8 result"
        if reason:
            kernel = "reference.quantized_linear"
            grids = y_grid is not None or x.dtype == torch.uint8
            return Explanation("quantized_linear", f"{kernel}_grid" if grids else kernel, reason)
        kernel, config, reason = _triton.explain(target, x.dtype, m, weight)
        return Explanation("quantized_linear", kernel, reason, config)

    def choose() -> tuple[str, str]:
        return extension.choose_quantized_linear(  # type: ignore
            weight.bits, weight.activations, checks.short(x.dtype), y_grid is not None
        )

    return _frozen.explain("quantized_linear", x, device, choose if extension else None)


# --- public function -----------------------------------------------------------------------


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    y_grid: Tensor | None = None,
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in int8 or int4.

    What happens to x is part of the weight (`quantize_weight`): it stays in floating point, or
    each row becomes u8 and the products are whole numbers. Sums of int8 by u8 are exact; groups
    are summed by themselves and added up in float32, as is the epilogue. A row of x with NaN or
    inf gives a row of NaN where x is quantised.

    With ``y_grid`` the result is rounded in the same pass and stored as u8, which the next layer
    reads as it is: ``clamp(rint(y * (1 / scale)) + zero_point, 0, 255)``, in float32 just what that
    layer would make of a float32 y by its static grid.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides. Or uint8, on the weight's own
            ``x_grid``, with activations "static".
        weight: `quantize_weight` of a ``[N, K]`` matrix; it has no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        y_grid: float32 ``[2]``, scale and zero point of a uint8 result (`static_grid` makes them of
            a range, ``weight.x_grid`` of the next layer is one), or None.

    Returns:
        ``[.., N]``: uint8 with ``y_grid``, else in x's dtype (of a uint8 x in that of bias, without
        one of residual, without both float32). Gradients for x, bias and residual are the
        straight-through ones: those of the linear layer with the dequantised weight. Under
        `torch.autocast` floating x, bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, a weight that
            requires a gradient, a grid that is none, or anything that requires a gradient where x
            or the result is uint8.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: NaN or inf in a y that was to become uint8: no number of it says that.
    """
    checks.stored(weight, QuantizedWeight, "quantize_weight")
    if y_grid is None and getattr(x, "dtype", None) is not torch.uint8:
        return _op.apply(x, *weight.arguments, bias, residual, activation)
    return _grid.apply(x, *weight.arguments, y_grid, bias, residual, activation)
