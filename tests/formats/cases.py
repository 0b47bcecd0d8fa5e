"""A weight in every format and form, and what compares two of them to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigops.formats import (
    BitmapWeight,
    Format,
    Fp8Weight,
    LowRankWeight,
    PackedWeight,
    QuantizedWeight,
    Sparse24Weight,
    SparseWeight,
)
from bigops.formats.patterns import n_m_mask
from bigops.formats.quantize import static_qparams
from bigops.ops.sparse_linear.sparse24_pack import pack24, prune24
from tests.support.cases.compressed import FP8, QUANTISED

Make = Callable[[Tensor], Format]
KINDS = (
    QuantizedWeight,
    Fp8Weight,
    PackedWeight,
    SparseWeight,
    Sparse24Weight,
    BitmapWeight,
    LowRankWeight,
)


def _quantised(options: dict[str, Any]) -> Make:
    given = dict(options)
    if given.get("activations") == "static":
        given["x_qparams"] = static_qparams(-2.0, 3.0)
    return lambda w: QuantizedWeight.from_dense(w, **given)


def _fp8(options: dict[str, Any]) -> Make:
    return lambda w: Fp8Weight.from_dense(w, **options)


def kept(w: Tensor) -> Tensor:
    return torch.arange(w.numel()).view(w.shape) % 3 == 0


def _factors(w: Tensor, form: type[Format], **options: Any) -> LowRankWeight:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return LowRankWeight.from_factors(u[:, :16] * s[:16], v[:16], form, **options)


# name -> a weight of a matrix whose sizes divide by 4
WEIGHTS: dict[str, Make] = {
    **{form: _quantised(options) for form, options in QUANTISED.items()},
    **{form: _fp8(options) for form, options in FP8.items()},
    "packed": PackedWeight.from_dense,
    "packed_bf16": lambda w: PackedWeight.from_dense(w.bfloat16()),
    "sparse": lambda w: SparseWeight.from_mask(w, kept(w), torch.int8, (1, 1)),
    "sparse_f32": lambda w: SparseWeight.from_mask(w, kept(w), torch.float32, (1, 1)),
    "sparse_rows": lambda w: SparseWeight.from_mask(w, kept(w[::16]), torch.bfloat16, (16, 1)),
    "24": lambda w: pack24(w, n_m_mask(w), torch.bfloat16),
    "24_int8": lambda w: pack24(w, n_m_mask(w), torch.int8),
    "24_both": lambda w: prune24(w, torch.float16, transposable=True),
    "bitmap": lambda w: BitmapWeight.from_mask(w, kept(w)),
    "bitmap_bf16": lambda w: BitmapWeight.from_mask(w, kept(w), torch.bfloat16),
    "low_rank": lambda w: _factors(w, PackedWeight),
    "low_rank_int8": lambda w: _factors(w, QuantizedWeight),
}
SPLIT = (*QUANTISED, *FP8, "packed", "packed_bf16")  # whose rows are parts by themselves
FLAT = [name for name in WEIGHTS if not name.startswith("low_rank")]  # with a schema


def weight_of(name: str, n: int = 36, k: int = 88) -> Format:
    torch.manual_seed(0)
    return WEIGHTS[name](torch.randn(n, k))


def bits(t: Tensor | None) -> Any:
    """What compares equal where all bits are, dtype and shape included."""
    if t is None:
        return None
    flat = t.detach().flatten()
    return t.dtype, list(t.shape), flat.view(torch.uint8).tolist() if t.numel() else []


def same(a: Any, b: Any) -> bool:
    """Whether two weights are equal, tensors to the bit and the rest by ==."""
    if type(a) is not type(b):
        return False
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, Format):
            equal = same(one, other)
        else:
            equal = bits(one) == bits(other) if isinstance(one, Tensor) else one == other
        if not equal:
            return False
    return True
