"""What optimiser steps store in few bits: 8-bit block-wise states and stochastic rounding.

The dynamic map is that of Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021,
arXiv 2110.02861), section 2.2; the random bits are those of Philox4x32-10 (Salmon et al., Parallel
Random Numbers: As Easy as 1, 2, 3, 2011). Both are the meaning that the kernels are held to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256
"""Elements of a row that share one absmax."""


@functools.cache
def _magnitudes(first: int) -> tuple[float, ...]:
    """0, the centres of ``first * 2^d`` equal parts of [0.1, 1] in decade 10^(d - 6), 1."""
    decades = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    values = [0.0]
    for d, decade in enumerate(decades):
        parts = first << d
        values += [decade * (0.1 + 0.9 * ((i + 0.5) / parts)) for i in range(parts)]
    return (*values, 1.0)


def _half(signed: bool) -> Tensor:
    """The map's magnitudes, float32 on the CPU."""
    values = _magnitudes(1 if signed else 2)
    return torch.tensor(values, dtype=torch.float64, device="cpu").float()


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the codes, ascending, float32: in [-1, 1], or in [0, 1]."""
    half = _half(signed)
    return torch.cat([-half[1:128].flip(0), half]) if signed else half


def blocks_of(numel: int) -> int:
    """How many absmax values a row of ``numel`` elements has."""
    return -(-numel // BLOCK)


def leading_of(shape: Sequence[int]) -> int:
    """How many of the first dimensions count rows; the others together are one row.

    A row is the last dimensions that hold a block of 256, never the first of several dimensions:
    ``in`` of a weight [out, in] and of experts [E, out, in], ``in * 9`` of a kernel of 3 x 3. So a
    parameter that is split between rows keeps whole blocks, however often it is split anew.
    """
    leading, row = len(shape), 1
    while leading > 1 and row < BLOCK:
        leading -= 1
        row *= shape[leading]
    return min(leading, len(shape) - 1) if shape else 0


def row_of(shape: Sequence[int], leading: int) -> int:
    """Elements of a row."""
    return math.prod(shape[leading:])


def scales_shape(shape: Sequence[int], leading: int | None = None) -> tuple[int, ...]:
    """Shape of the absmax values of a tensor of ``shape``: its rows, and the blocks of each."""
    if leading is None:
        leading = leading_of(shape)
    return (*shape[:leading], blocks_of(row_of(shape, leading)))


def fits(scales: Tensor, shape: Sequence[int]) -> bool:
    """Whether scales are of a tensor of ``shape`` by rows, whatever its rows are."""
    leading = scales.ndim - 1
    return 0 <= leading <= len(shape) and tuple(scales.shape) == scales_shape(shape, leading)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Float32 values of uint8 codes and their float32 absmax, `scales_shape` of some rows."""
    values = dynamic_map(signed).to(codes.device)[codes.int()]
    row = row_of(codes.shape, scales.ndim - 1)
    each = scales.repeat_interleave(BLOCK, -1)[..., :row]
    return values * each.reshape(codes.shape)


def _middles(values: Tensor) -> Tensor:
    """Above the i-th, value i + 1 is the nearer; 15 bits of mantissa, as kernels hold it."""
    middles = ((values[:-1].double() + values[1:].double()) / 2).float()
    return (middles.view(torch.int32) & -256).view(torch.float32)


def encode(x: Tensor, signed: bool, leading: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes (uint8, x's shape) and absmax (float32, `scales_shape`) of a float32 x.

    Nearest values of the map; in the unsigned map what is above 0 never becomes 0, since a
    denominator of 0 beside a first moment that is not would be a leap of the parameter.
    """
    shape = scales_shape(x.shape, leading)
    rows, row = math.prod(shape[:-1]), row_of(x.shape, len(shape) - 1)
    flat = x.reshape(rows, row)
    padded = torch.nn.functional.pad(flat.abs(), (0, shape[-1] * BLOCK - row))
    scales = padded.reshape(*shape, BLOCK).amax(-1) if x.numel() else x.new_zeros(shape)
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).reshape(rows, shape[-1])
    q = flat / divisor.repeat_interleave(BLOCK, 1)[:, :row]
    half = _half(signed).to(x.device)
    index = torch.bucketize(q.abs(), _middles(half))
    if signed:
        index = torch.where(flat < 0, (127 - index).clamp_min(0), 127 + index)
    else:
        index = torch.where((index == 0) & (flat > 0), 1, index)
    return index.to(torch.uint8).reshape(x.shape), scales


def buckets(signed: bool) -> Tensor:
    """The nearest magnitude by table, int32 ``[22 * 128 + 1]``, as GPU kernels look it up.

    A bucket holds the floats that share an exponent and 7 bits of mantissa, from 2^-22 on; the
    first holds all below. Its low 8 bits are the index of the value nearest to its lower end, the
    others the float past which the next value is nearer: no bucket holds two middles.
    """
    half = _half(signed)
    middles = torch.cat([_middles(half), half.new_tensor([torch.inf])])
    numbers = torch.arange(22 * 128, dtype=torch.int32, device="cpu") + ((127 - 22) << 7)
    lower = torch.cat([half.new_zeros(1), (numbers << 16).view(torch.float32)])
    index = torch.bucketize(lower, middles)
    return middles[index].view(torch.int32) | index.int()


# --- stochastic rounding -------------------------------------------------------------------

_LOW = 0xFFFFFFFF


def _times(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two 32-bit numbers, held in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # both below 2^48
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _LOW


def philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter (four 32-bit words in int64) and 64-bit seed."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _times(0xD2511F53, c0)
        high1, low1 = _times(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def random_bits(indices: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """16 random bits (int32) of seed, stream (which tensor), step and element index alone.

    Element 256 b + 32 j + lane takes half j % 2 of word j / 2 of counter 32 b + lane.
    """
    lanes, j = (indices // BLOCK) * 32 + indices % 32, indices % BLOCK // 32
    same = torch.ones_like(lanes)
    words = philox((lanes & _LOW, lanes >> 32, same * stream, same * (step & _LOW)), seed)
    word = torch.stack(words).gather(0, (j // 2)[None])[0]
    return ((word >> 16 * (j % 2)) & 0xFFFF).int()


def indices_of(numel: int, place: tuple[int, int, int] | None, device: torch.device) -> Tensor:
    """Index of each element in the whole tensor, of which a part is given by first, run, stride."""
    i = torch.arange(numel, dtype=torch.int64, device=device)
    if place is None:
        return i
    first, run, stride = place
    return first + i // run * stride + i % run


def round_stochastic(
    x: Tensor, seed: int, stream: int, step: int, place: tuple[int, int, int] | None = None
) -> Tensor:
    """A float32 x in bfloat16, up with a probability of what truncation would drop."""
    bits = x.contiguous().view(torch.int32).reshape(-1)
    random = random_bits(indices_of(x.numel(), place, x.device), seed, stream, step)
    finite = x.reshape(-1).isfinite()
    rounded = torch.where(finite, bits + random, bits) & -65536
    rounded = torch.where(x.reshape(-1).isnan(), bits | 0x400000, rounded)
    return rounded.view(torch.float32).to(torch.bfloat16).reshape(x.shape)
