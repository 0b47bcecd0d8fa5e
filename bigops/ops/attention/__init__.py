"""attention: softmax(q k^T scale + mask) v, for inference; views of a projection are not copied."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.ops import forward_mode
from bigops.ops.attention.check import check
from bigops.ops.attention.choose import op, refuse_gradients
from bigops.ops.attention.reference import reference
from bigops.ops.library import autocast, is_autocast_on

__all__ = ["attention", "reference"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    bf16: bool = False,
) -> Tensor:
    """``softmax(q @ k.mT * scale + mask) @ v`` by head, for inference.

    Made for sequences of up to about a thousand tokens on a CPU, and for a step of decoding over a
    cache of keys and values; longer ones, float64 and other devices take
    `torch.nn.functional.scaled_dot_product_attention` (`bigops.explain` says which).

    q, k and v are read as they lie where their last dimension is contiguous, so that the views that
    a merged projection ``[B, T, (Hq + 2 Hkv) D]`` leaves are not copied.

    Args:
        q: ``[B, Hq, T, D]``; float32, bfloat16, float16 or float64.
        k: ``[B, Hkv, S, D]``; Hq is a multiple of Hkv, and head h of q attends to head
            ``h // (Hq / Hkv)`` (grouped heads, as SDPA's ``enable_gqa``).
        v: ``[B, Hkv, S, Dv]``.
        mask: bool (True attends) or of any floating dtype (added to the scores); broadcastable to
            ``[B, Hq, T, S]``, and never expanded in memory: key padding ``[B, 1, 1, S]``, relative
            bias ``[1, Hq, T, S]``. Blocks of keys that it shuts out are not read. It may stand
            together with ``causal``.
        causal: query i attends to the keys 0 to i, as SDPA's ``is_causal``.
        scale: of the scores; ``1 / sqrt(D)`` where it is None.
        bf16: of float32: operands of both products may be rounded to bfloat16, as
            ``torch.set_float32_matmul_precision("medium")`` has it, where the CPU multiplies pairs
            of them; sums, softmax and result stay float32.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of q, whose memory is ``[B, T, Hq, Dv]``: its
        ``transpose(1, 2).reshape(B, T, Hq * Dv)`` is a view. A query that no key is open for (False
        or -inf all along, or no key at all) gives zeros, as SDPA has it. Scores and sums are
        float32 for bf16 and fp16; where the CPU multiplies pairs of bf16, the probabilities are
        rounded to bf16. Under `torch.autocast` q, k and v are cast to the autocast dtype first.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: a gradient is asked for: there is none.
    """
    if not isinstance(q, Tensor) and torch.overrides.has_torch_function_unary(q):  # of torch.fx
        return op(q, k, v, mask, causal, scale, bf16)  # type: ignore[no-any-return]
    try:
        if is_autocast_on(q):
            q, k, v = autocast(q.device.type, q, k, v)  # type: ignore[assignment]
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (q, k, v, mask)
        ):
            refuse_gradients()
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(q, k, v, mask, causal, scale, bf16)  # type: ignore[no-any-return]
        if forward_mode.is_active():
            return reference(q, k, v, mask, causal=causal, scale=scale)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(q, k, v, mask, causal, scale, bf16)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError, TypeError):
        # The kernel checks its arguments; only a refused call pays for naming what is wrong
        if not torch.compiler.is_compiling():
            check(q, k, v, mask, scale)
        raise
