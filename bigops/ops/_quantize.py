"""The int8 quantisers that quantized_linear and sparse_linear share, in plain torch.

Weights: symmetric, one scale per output row. Activations: asymmetric u8, one scale and zero point
per row of x, found at run time. The C++ quantiser (csrc/cpu/simd/quantize.inl) agrees with
`quantize_rows` to the bit; both hold every step in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops.ops import _checks as checks

SERVED = (torch.float32, torch.bfloat16, torch.float16)
TINY = torch.finfo(torch.float32).tiny


class Rows(NamedTuple):
    """Quantised rows: x is about ``scale * (q - zero_point)``."""

    q: Tensor  # [.., K] float32, whole numbers 0..255
    scale: Tensor  # [.., 1] float32; NaN for a row that holds NaN or inf
    zero_point: Tensor  # [.., 1] float32, whole numbers 0..255


def quantize_rows(x: Tensor) -> Rows:
    """Quantise each row of ``x`` [.., K] to u8 so that zero is represented exactly."""
    x = x.float()
    if x.shape[-1] == 0:
        one = x.new_ones((*x.shape[:-1], 1))
        return Rows(x, one, torch.zeros_like(one))
    lo = x.amin(-1, keepdim=True).clamp(max=0)
    hi = x.amax(-1, keepdim=True).clamp(min=0)
    finite = lo.isfinite() & hi.isfinite()
    scale = (hi / 255 - lo / 255).clamp(min=TINY)
    inverse = 1 / scale
    zero_point = torch.where(finite, torch.round(-lo * inverse).clamp(0, 255), 0)
    q = torch.where(finite, (torch.round(x * inverse) + zero_point).clamp(0, 255), 0)
    return Rows(q, torch.where(finite, scale, torch.nan), zero_point)


def row_scales(w: Tensor) -> Tensor:
    """Scale [N] float32 that maps the largest magnitude of each row of ``w`` [N, ..] to 127."""
    largest = w.float().flatten(1).abs().amax(1) if w.numel() else w.new_zeros(w.shape[0]).float()
    return torch.where(largest > 0, (largest / 127).clamp(min=TINY), 1)


def to_int8(w: Tensor, scale: Tensor) -> Tensor:
    """``w / scale`` rounded to int8 in -127..127; scale broadcasts against w."""
    return torch.round(w.float() / scale).clamp(-127, 127).to(torch.int8)


def check_weight(w: Tensor) -> None:
    """Raise unless ``w`` is a finite floating-point matrix that can be compressed."""
    if not isinstance(w, Tensor):
        raise TypeError(f"w: expected a torch.Tensor; got {type(w).__name__}")
    checks.floating("w", w)
    checks.matrix("w", w)
    if not bool(torch.isfinite(w).all()):
        raise ValueError("w: expected finite values; got NaN or inf")
