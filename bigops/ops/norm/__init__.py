"""norm, norm_with_sum, norm_act_quant: layer norm and RMS norm, for inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigops.ops.codes import CODES, code_of
from bigops.ops.library import cast, is_autocast_on
from bigops.ops.norm import choose as choose  # registers what `explain` says
from bigops.ops.norm.reference import reference
from bigops.ops.norm.schema import ACT_QUANT, NORM, WITH_SUM, Call, Form

__all__ = ["NormQuantised", "norm", "norm_act_quant", "norm_with_sum", "reference"]

_KINDS = CODES["kind"]


class NormQuantised(NamedTuple):
    """A normed tensor as u8 numbers: about ``scale * (values - zero_point)``, row by row."""

    values: Tensor  # uint8 [.., K], contiguous
    scale: Tensor  # float32 [..]; NaN for a row that holds NaN or inf
    zero_point: Tensor  # int32 [..], 0..255
    y: Tensor | None  # [.., K] in x's dtype, where kept
    sum: Tensor | None  # x + residual, [.., K] in x's dtype, where kept


def _in_autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Any, ...]:
    """The tensors as torch's own norms take them: float32 on a GPU, on the CPU as they come."""
    if x.device.type != "cpu":
        return cast(torch.float32, x, weight, bias, residual)
    if residual is not None and residual.dtype != x.dtype:
        x, residual = cast(torch.promote_types(x.dtype, residual.dtype), x, residual)
    if any(t is not None and t.dtype not in (x.dtype, torch.float32) for t in (weight, bias)):
        weight, bias = cast(torch.float32, weight, bias)
    return x, weight, bias, residual


def _run(
    form: Form,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    kind: str,
    *flags: bool,
) -> Any:
    try:
        if not isinstance(x, Tensor) and torch._C._has_torch_function_unary(x):  # fx's proxies
            return form.words(x, weight, bias, residual, eps, kind, *flags)
        compiling = torch.compiler.is_compiling()
        if (compiling or torch._C._is_any_autocast_enabled()) and is_autocast_on(x):
            x, weight, bias, residual = _in_autocast(x, weight, bias, residual)
        coded = (x, weight, bias, residual, eps, _KINDS[kind], *flags)
        if torch.is_grad_enabled():
            Call(x, weight, bias, residual, eps, kind).refuse_gradients()
        elif not compiling and torch.is_inference_mode_enabled():  # autograd is out of the way
            return form.op(*coded)
        if (
            compiling
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return form.op(*coded)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return form.op(*coded)
    except (RuntimeError, AttributeError, TypeError, KeyError):
        # The kernel checks its arguments; only a refused call pays for naming what is wrong
        code_of("kind", kind)
        if not torch.compiler.is_compiling():
            Call(x, weight, bias, residual, eps, kind).check_tensors()
            form.check(x, weight, bias, residual, eps, kind, *flags)
        raise


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layer",
) -> Tensor:
    """Layer norm (arXiv 1607.06450) or RMS norm (arXiv 1910.07467) of ``x + residual``.

    Over the last dimension, in one pass over memory: ``(v - mean(v)) / sqrt(var(v) + eps) * weight
    + bias`` with kind "layer", ``v / sqrt(mean(v^2) + eps) * weight + bias`` with "rms", the
    arithmetic in float32 and one rounding at the end. Inference only: it has no gradient.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16. Rows of a view are read where they lie if
            their columns are contiguous.
        weight: ``[K]`` in x's dtype or float32, or None.
        bias: ``[K]`` in the weight's dtype (without one in x's or float32), or None.
        residual: added to x before the norm, of its shape and dtype, or None.
        eps: at least 0. `torch.nn.functional.rms_norm` takes ``torch.finfo(x.dtype).eps`` by
            default, models of transformers their config's.
        kind: "layer" or "rms".

    Returns:
        ``[.., K]`` in x's dtype, contiguous. Under `torch.autocast` as torch's own norms: float32
        on a GPU, on the CPU x's dtype, or the wider of x and residual where they differ.

    Raises:
        ValueError: unknown kind, shapes or devices that do not fit, a negative eps.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: an argument that asks for a gradient.
    """
    return _run(NORM, x, weight, bias, residual, eps, kind)  # type: ignore[no-any-return]


def norm_with_sum(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layer",
) -> tuple[Tensor, Tensor]:
    """`norm` and what it is of: ``(norm(x + residual), x + residual)``.

    A transformer that norms before its layers goes on with both.

    Args:
        x, weight, bias, eps, kind: as for `norm`.
        residual: of x's shape and dtype; needed.

    Returns:
        Two tensors ``[.., K]`` in x's dtype. The norm is of the sum before it is rounded.

    Raises:
        ValueError, TypeError, RuntimeError: as `norm`; ValueError without a residual.
    """
    return _run(WITH_SUM, x, weight, bias, residual, eps, kind)  # type: ignore[no-any-return]


def norm_act_quant(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layer",
    symmetric: bool = False,
    keep_float: bool = False,
    keep_sum: bool = False,
) -> NormQuantised:
    """`norm`, each row of it quantised to u8 while it is in L1.

    The numbers are those that `quantized_linear` makes of a float32 x with activations "dynamic",
    or "symmetric": `bigops.formats.quantize.act_quant`. They are made of the norm in float32,
    before it is rounded to x's dtype.

    Args:
        x, weight, bias, residual, eps, kind: as for `norm`.
        symmetric: scales by the largest magnitude of each row, zero point 128; else by its range.
        keep_float: give ``y``, the norm in x's dtype, too.
        keep_sum: give ``sum``, which is x + residual, too; it needs a residual.

    Returns:
        ``(values, scale, zero_point, y, sum)``; what is not kept is None. A row with NaN or inf has
        scale NaN and values 0.

    Raises:
        ValueError, TypeError, RuntimeError: as `norm`.
    """
    flags = (symmetric, keep_float, keep_sum)
    values, scale, zero_point, y, total = _run(
        ACT_QUANT, x, weight, bias, residual, eps, kind, *flags
    )
    return NormQuantised(
        values, scale, zero_point, y if keep_float else None, total if keep_sum else None
    )
