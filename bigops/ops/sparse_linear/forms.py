"""Second forms of a sparse weight that some GPU kernels take, and which call they are worth."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.formats.base import Format
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse24 import Sparse24Weight, to_dense, uneven
from bigops.ops.sparse_linear import bitmap, cuda, sparse24
from bigops.ops.sparse_linear import sparse24_pack as packing


def wanted(x: Tensor, stored: torch.dtype, two_of_four: bool) -> type[Format] | None:
    """The form that a call on x without gradients is better served by, or None.

    A weight that is 2:4 has that of sparse tensor cores, but for the few rows of a decode step,
    which stay with the kernel for them, that divides K among blocks. Other floating weights may be
    kept as a bitmap for a decode step.
    """
    rows = x.shape[:-1].numel()
    if two_of_four:
        serves = stored != torch.float32 and rows > cuda.MAX_ROWS
        return Sparse24Weight if serves and sparse24.serves(stored, x.shape[-1], x.device) else None
    autocast = torch.is_autocast_enabled(x.device.type)
    serves = x.dtype == stored and not autocast and bitmap.serves(rows, x.device)
    return BitmapWeight if serves else None


def converted(weight: SparseWeight, form: type[Format]) -> Format:
    """The weight in a form of `wanted`, or itself where that cannot hold it or saves nothing."""
    if form is BitmapWeight:
        packed = BitmapWeight.from_sparse(weight)
        return packed if packed.nbytes < weight.nbytes else weight
    try:
        return Sparse24Weight.from_sparse(weight)
    except ValueError:
        # bfloat16 values that were trained fill their words, the entries that the pattern 2:4
        # dropped among them
        return weight


def trains_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether forward and backward run on a 2:4 pack of a masked weight [N, K] for a call on x."""
    kind, low = x.device.type, torch.bfloat16
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return (
        dtype == low
        and x.is_floating_point()
        and not uneven(weight)
        and x.shape[-1:] == weight.shape[1:]  # else the other path says what is wrong
        and sparse24.serves(low, x.shape[-1], x.device)
        and packing.serves(weight, low)
    )


def packed(weight: Tensor, mask: Tensor) -> Sparse24Weight:
    """``weight * mask`` in bfloat16 by the packing kernel, differentiable for ``weight``.

    Nothing is asked of the device: a mask that is not 2:4 along rows and columns gives NaN.
    """
    values, meta, meta_t = _Packed24.apply(weight, mask)
    return Sparse24Weight(values, meta, None, None, meta_t, weight.shape[1])


class _Packed24(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask):  # type: ignore[no-untyped-def]
        packed = packing.pack(weight.detach(), mask, "given", torch.bfloat16, True)
        ctx.save_for_backward(packed.meta)
        ctx.columns, ctx.dtype = weight.shape[1], weight.dtype
        ctx.mark_non_differentiable(packed.meta, packed.meta_t)
        return packed.values, packed.meta, packed.meta_t

    @staticmethod
    def backward(ctx, grad, *rest):  # type: ignore[no-untyped-def]
        (meta,) = ctx.saved_tensors
        return to_dense(grad, meta, ctx.columns).to(ctx.dtype), None
