"""Other forms of a sparse layer's weight that some kernels take, made from mask or storage."""

from __future__ import annotations

import torch

from bigops.formats.bitmap import BitmapWeight
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse24 import Sparse24Weight, to_dense
from bigops.ops.sparse_linear import sparse24_pack as packing


class Packed24(torch.autograd.Function):
    """(values, meta, meta_t) of ``weight * mask`` in bfloat16 by the packing kernel.

    Nothing is asked of the device: a mask that is not 2:4 along rows and columns gives NaN.
    """

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


def compressed(storage: SparseWeight) -> Sparse24Weight | None:
    """The form of sparse tensor cores, or None: bfloat16 values that were trained fill their words,
    the entries that the pattern 2:4 dropped among them.
    """
    try:
        return Sparse24Weight.from_sparse(storage)
    except ValueError:
        return None


def as_bitmap(storage: SparseWeight) -> BitmapWeight | None:
    """The form of a bitmap, or None where it takes no fewer bytes: then it would not be faster."""
    packed = BitmapWeight.from_sparse(storage)
    return packed if packed.nbytes < storage.nbytes else None
