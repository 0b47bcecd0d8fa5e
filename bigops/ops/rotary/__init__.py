"""rotary: rotary position embeddings of q and k, for inference; views are not copied."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.ops import forward_mode
from bigops.ops.rotary.check import check
from bigops.ops.rotary.choose import op, refuse_gradients
from bigops.ops.rotary.reference import reference

__all__ = ["reference", "rotary"]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` over the first R columns of each head, for inference.

    ``rotate_half(x) = cat(-x[..., R/2:R], x[..., :R/2])``: columns half of R apart are turned as a
    pair (Llama, GPT-NeoX; not the pairs of neighbours of GPT-J). Columns from R on are copied. The
    arithmetic is float32, with one rounding at the end.

    x is read as it lies where its last dimension is contiguous, so that the views that a merged
    projection ``[B, T, (Hq + 2 Hkv) D]`` leaves are not copied.

    Args:
        x: ``[B, H, T, D]``; float32, bfloat16 or float16.
        cos: ``[T, R]``, ``[B or 1, T, R]`` or ``[B or 1, 1, T, R]`` in x's dtype or float32; R is
            even and at most D.
        sin: likewise, in the dtype of cos.

    Returns:
        ``[B, H, T, D]`` in x's dtype, under `torch.autocast`, too, whose memory is
        ``[B, T, H, D]``, as `bigops.attention` reads it best.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: a gradient is asked for: there is none.

    Source: RoFormer, arXiv 2104.09864.
    """
    if not isinstance(x, Tensor) and torch.overrides.has_torch_function_unary(x):  # of torch.fx
        return op(x, cos, sin)  # type: ignore[no-any-return]
    try:
        if torch.is_grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
            refuse_gradients()
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(x, cos, sin)  # type: ignore[no-any-return]
        if forward_mode.is_active():
            return reference(x, cos, sin)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(x, cos, sin)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError, TypeError):
        # The kernel checks its arguments; only a refused call pays for naming what is wrong
        if not torch.compiler.is_compiling():
            check(x, cos, sin)
        raise
