"""fp8_linear: y = act(x W^T + bias) + residual, W in float8_e4m3fn, x in floating point or e4m3fn.

Reference, op (schema, fake, autograd, vmap come from `bigops.ops.family`), dispatch, public
function, in that order; the storage and its conversion are in `bigops.formats.fp8`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, fp8
from bigops.formats.fp8 import Fp8Weight, quantize_fp8
from bigops.formats.quantize import SERVED
from bigops.ops import activation as act
from bigops.ops import family as _frozen
from bigops.ops import targets
from bigops.ops.explain import Explanation, serves
from bigops.ops.fp8_linear import triton as _kernels
from bigops.ops.library import register

__all__ = ["Fp8Weight", "fp8_linear", "quantize_fp8", "reference"]

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    x_scale: Tensor | None,
    k: int,
    scales: str,
    activations: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `fp8_linear` in plain torch; the storage as in `Fp8Weight`."""
    weight = Fp8Weight(values, scale, x_scale, k, scales, activations)
    if activations == "none":
        z = F.linear(x.float(), weight.to_dense())
    elif scales == "block":
        seen = fp8.quantize_rows(x, True).dense()
        z = F.linear(seen, weight.to_dense())
    else:  # scales after the sums, which no small scale makes 0
        rows = fp8.quantize_rows(x, False, x_scale)
        z = F.linear(rows.q, values.float()[:, :k]) * scale[:, 0] * rows.scale
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(x: Tensor, *fixed: object) -> Tensor:
    return Fp8Weight(*fixed).to_dense()  # type: ignore[arg-type]


def check(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    x_scale: Tensor | None,
    k: int,
    scales: str,
    activations: str,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    fp8.check_storage(values, scale, x_scale, k, scales, activations)
    checks.device("values", values, x)
    _frozen.check_call(x, values.shape[0], k, bias, residual, activation, SERVED)


# --- op ------------------------------------------------------------------------------------


class _Fp8Linear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *fixed: object) -> int:
        values = fixed[0]
        assert isinstance(values, Tensor)
        return values.shape[0]


_op = _Fp8Linear(
    "fp8_linear",
    "Tensor values, Tensor scale, Tensor? x_scale, int k, str scales, str activations",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *fixed: fixed[-1] != "none",
)
reference_backward = _op.reference_backward


# --- dispatch ------------------------------------------------------------------------------
# On a GPU, Triton serves, backward included. On the CPU the reference does: no instruction set that
# the CPU kernels are built for multiplies e4m3.


def _cuda(x, *args):  # type: ignore[no-untyped-def]
    if not targets.serves(x.dtype, x.device, "fp8_linear"):
        return _op._serve(x, *args)
    check(x, *args)
    return _kernels.forward(x, *args)


def _cuda_backward(grad, x, *args):  # type: ignore[no-untyped-def]
    if not targets.serves(x.dtype, x.device, "fp8_linear"):
        return _op._serve_backward(grad, x, *args)
    return _kernels.backward(grad, x, *args)


register(_op.forward, cuda=_cuda)
register(_op.backward, cuda=_cuda_backward)


@serves("fp8_linear")
def _explain(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> Explanation:
    checks.stored(weight, Fp8Weight, "quantize_fp8")
    _op.check(x, *weight.arguments, bias, residual, activation)
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    reason = "no CPU kernel for e4m3: plain torch multiplies by the dequantised weight"
    if target != "cpu":
        reason = targets.why_not(x.dtype, target, "fp8_linear")
        if not reason:
            m = x.shape[:-1].numel()
            kernel, config, reason = _kernels.explain(target, x.dtype, m, weight)
            return Explanation("fp8_linear", kernel, reason, config)
    return Explanation("fp8_linear", "reference.fp8_linear", reason)


# --- public function -----------------------------------------------------------------------


def fp8_linear(
    x: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in float8_e4m3fn.

    What happens to x is part of the weight (`quantize_fp8`): it stays in floating point, or it is
    rounded to e4m3fn as well, by a scale for each row, for each 128 columns of a row, or one that
    was given; numbers past 448 scales become 448. The numbers are the same on every device, also
    where no unit multiplies them. Sums and epilogue are held in float32; in blocks the sums of each
    128 columns are scaled by themselves (arXiv:2412.19437). A row of x with NaN or inf gives a row
    of NaN where x is rounded.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides.
        weight: `quantize_fp8` of a ``[N, K]`` matrix; it has no gradient.
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
    checks.stored(weight, Fp8Weight, "quantize_fp8")
    return _op.apply(x, *weight.arguments, bias, residual, activation)
