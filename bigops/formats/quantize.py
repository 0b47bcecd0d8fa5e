"""The quantisers that quantized_linear and sparse_linear share, in plain torch.

Weights: one scale per output row or per group of columns, symmetric or with a zero point.
Activations: u8 with one scale and zero point per row of x, found at run time, or given. The C++
quantisers (csrc/cpu/simd/quantize.inl, quantized_linear.inl) agree with `act_quant` to the
bit; both hold every step in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops.formats import checks

SERVED = (torch.float32, torch.bfloat16, torch.float16)
TINY = torch.finfo(torch.float32).tiny


class Rows(NamedTuple):
    """Quantised rows: x is about ``scale * (q - zero_point)``."""

    q: Tensor  # [.., K] float32, whole numbers 0..255
    scale: Tensor  # [.., 1] float32; NaN for a row that holds NaN or inf
    zero_point: Tensor  # [.., 1] float32, whole numbers 0..255


class QuantizedRows(NamedTuple):
    """Rows as kernels hand them over: row r is about ``scale[r] * (values[r] - zero_point[r])``.

    `bigops.act_quant` makes them; `quantized_linear` and `sparse_linear` take them for x.
    """

    values: Tensor  # [.., K] uint8
    scale: Tensor  # [..] float32; NaN for a row that held NaN or inf
    zero_point: Tensor  # [..] int32, 0..255


def act_quant(x: Tensor, activations: str = "dynamic", qparams: Tensor | None = None) -> Rows:
    """Quantise each row of ``x`` [.., K] to u8 so that zero is represented exactly.

    Args:
        x: floating, or the u8 numbers themselves with "static".
        activations: "dynamic": the range of each row, with a zero point. "symmetric": the
            largest magnitude of each row, zero point 128. "static": ``qparams`` for all rows.
        qparams: float32 [2], scale and zero point.
    """
    known = x.dtype == torch.uint8
    x = x.float()
    one = x.new_ones((*x.shape[:-1], 1))
    if x.shape[-1] == 0:
        return Rows(x, one, torch.zeros_like(one))
    if known:
        assert qparams is not None
        return Rows(x, one * qparams[0], one * qparams[1])
    lo = x.amin(-1, keepdim=True).clamp(max=0)
    hi = x.amax(-1, keepdim=True).clamp(min=0)
    finite = lo.isfinite() & hi.isfinite()
    least = 0
    if activations == "static":
        assert qparams is not None
        scale, zero_point = one * qparams[0], one * qparams[1]
    elif activations == "symmetric":
        scale, zero_point = (torch.maximum(-lo, hi) / 127).clamp(min=TINY), one * 128
        least = 1
    else:
        scale = (hi / 255 - lo / 255).clamp(min=TINY)
        zero_point = torch.where(finite, torch.round(-lo * (1 / scale)).clamp(0, 255), 0)
    inverse = 1 / scale
    q = torch.where(finite, (torch.round(x * inverse) + zero_point).clamp(least, 255), 0)
    return Rows(q, torch.where(finite, scale, torch.nan), zero_point)


def static_qparams(lo: float, hi: float) -> Tensor:
    """Scale and zero point, float32 [2], of u8 over [lo, hi]; the range takes in 0.

    Raises:
        ValueError: NaN, inf, or lo above hi.
    """
    if not (-float("inf") < lo <= hi < float("inf")):
        raise ValueError(f"lo, hi: expected finite numbers, lo <= hi; got {lo}, {hi}")
    ends = (min(lo, 0.0), max(hi, 0.0))
    low, high = torch.tensor(ends, dtype=torch.float32, device="cpu").unbind()
    scale = (high / 255 - low / 255).clamp(min=TINY)
    return torch.stack([scale, torch.round(-low / scale).clamp(0, 255)])


def check_qparams_form(name: str, qparams: Tensor) -> None:
    """Raise TypeError or ValueError unless ``qparams`` is float32 [2]."""
    checks.dtype(name, qparams, torch.float32)
    checks.shape(name, qparams, [2])


def check_qparams(name: str, qparams: Tensor) -> None:
    """Raise TypeError or ValueError unless ``qparams`` is a scale and a zero point of u8."""
    check_qparams_form(name, qparams)
    scale, zero = qparams.tolist()
    # 1 / scale is finite from the smallest normal number on
    if not (TINY <= scale < float("inf") and 0 <= zero <= 255 and zero == int(zero)):
        raise ValueError(
            f"{name}: expected a finite scale above 0 and a whole zero point in 0..255; "
            f"got {scale}, {zero}"
        )


def quantize_u8(y: Tensor, qparams: Tensor) -> Tensor:
    """``clamp(rint(y * (1 / scale)) + zero_point, 0, 255)`` as u8, in float32 throughout.

    Raises:
        RuntimeError: NaN or inf in y, for which u8 has no number.
    """
    y = y.float()
    if not bool(torch.isfinite(y).all()):
        raise RuntimeError(
            "y: expected finite values, since u8 by y_qparams holds no other; got NaN or inf"
        )
    return (torch.round(y * (1 / qparams[0])) + qparams[1]).clamp(0, 255).to(torch.uint8)


def dequantize_u8(q: Tensor, qparams: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the u8 numbers ``q`` stand for."""
    return ((q.float() - qparams[1]) * qparams[0]).to(dtype)


def row_scales(w: Tensor) -> Tensor:
    """Scale [N] float32 that maps the largest magnitude of each row of ``w`` [N, ..] to 127."""
    largest = w.float().flatten(1).abs().amax(1) if w.numel() else w.new_zeros(w.shape[0]).float()
    return torch.where(largest > 0, (largest / 127).clamp(min=TINY), 1)


def to_int8(w: Tensor, scale: Tensor) -> Tensor:
    """``w / scale`` rounded to int8 in -127..127; scale broadcasts against w."""
    return torch.round(w.float() / scale).clamp(-127, 127).to(torch.int8)


class Rounded(NamedTuple):
    """A rounded weight: ``scale * (q - zero_point)``, groups along K."""

    q: Tensor  # [N, K] float32, whole numbers
    scale: Tensor  # [N, groups] float32
    zero_point: Tensor | None  # [N, groups] float32, whole numbers

    def dense(self, group: int) -> Tensor:
        """[N, K] float32."""
        k = self.q.shape[1]
        q = self.q if self.zero_point is None else self.q - widen(self.zero_point, group, k)
        return q * widen(self.scale, group, k)


def widen(t: Tensor, group: int, k: int) -> Tensor:
    """[N, groups] as [N, K]; a group of 0 is all of K."""
    return t.expand(-1, k) if group == 0 else t.repeat_interleave(group, 1)[:, :k]


def round_weight(w: Tensor, bits: int, group: int, symmetric: bool) -> Rounded:
    """Round ``w`` [N, K] in its groups (float32 throughout).

    Symmetric: the largest magnitude of a group goes to 127; in 4 bits to 7.5, so that the range
    -8..7 is half a step off at both ends and finer than with 7. With a zero point the range of
    the group, 0 included, takes the whole range.
    """
    w = w.float()
    k = w.shape[1]
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    if symmetric:
        top = 127.0 if bits == 8 else 7.5
        hi = _by_group(w.abs(), group).amax(2)
        scale = torch.where(hi > 0, (hi / top).clamp(min=TINY), 1)
        zero = None
        q = w / widen(scale, group, k)
        low = -127 if bits == 8 else low
    else:
        parts = _by_group(w, group)
        lo, hi = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scale = hi / (high - low) - lo / (high - low)
        scale = torch.where(scale > 0, scale.clamp(min=TINY), 1)
        zero = (torch.round(-lo / scale) + low).clamp(low, high)
        zero = torch.where((lo == 0) & (hi == 0), 0, zero)  # a group of zeros is exact in any form
        q = w / widen(scale, group, k) + widen(zero, group, k)
    return Rounded(torch.round(q).clamp(low, high), scale, zero)


def _by_group(w: Tensor, group: int) -> Tensor:
    """[N, groups, length], the last group filled with zeros, which no range minds."""
    n, k = w.shape
    length = group or max(k, 1)
    groups = 1 if group == 0 else -(-k // group)
    return torch.nn.functional.pad(w, (0, groups * length - k)).view(n, groups, length)


def check_weight(w: Tensor) -> None:
    """Raise unless ``w`` is a finite floating-point matrix that can be compressed."""
    if not isinstance(w, Tensor):
        raise TypeError(f"w: expected a torch.Tensor; got {type(w).__name__}")
    checks.floating("w", w)
    checks.matrix("w", w)
    if not bool(torch.isfinite(w).all()):
        raise ValueError("w: expected finite values; got NaN or inf")
