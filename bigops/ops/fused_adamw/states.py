"""What optimiser steps store in few bits: 8-bit block-wise states and stochastic rounding.

The dynamic map is that of Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021,
arXiv 2110.02861), section 2.2; the random bits are those of Philox4x32-10 (Salmon et al., Parallel
Random Numbers: As Easy as 1, 2, 3, 2011). Both are the meaning that the kernels are held to.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share one absmax."""


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
    """How many absmax values a state of ``numel`` elements has."""
    return -(-numel // BLOCK)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Float32 values of uint8 codes and their float32 absmax per block of 256."""
    values = dynamic_map(signed).to(codes.device)[codes.reshape(-1).int()]
    return (values * scales.repeat_interleave(BLOCK)[: codes.numel()]).reshape(codes.shape)


def _middles(values: Tensor) -> Tensor:
    """Above the i-th, value i + 1 is the nearer; 15 bits of mantissa, as kernels hold it."""
    middles = ((values[:-1].double() + values[1:].double()) / 2).float()
    return (middles.view(torch.int32) & -256).view(torch.float32)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, x's shape) and absmax per block of 256 elements (float32) of a float32 x.

    Nearest values of the map; in the unsigned map what is above 0 never becomes 0, since a
    denominator of 0 beside a first moment that is not would be a leap of the parameter.
    """
    flat = x.reshape(-1)
    scales = x.new_zeros(blocks_of(x.numel()) * BLOCK)
    scales[: x.numel()] = flat.abs()
    scales = scales.reshape(-1, BLOCK).amax(1) if x.numel() else x.new_zeros(0)
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    q = flat / divisor.repeat_interleave(BLOCK)[: x.numel()]
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


def random_bits(numel: int, seed: int, stream: int, step: int, device: torch.device) -> Tensor:
    """16 random bits per element (int32): of seed, stream (which tensor), step and index alone."""
    lanes = torch.arange(blocks_of(numel) * 32, dtype=torch.int64, device=device)
    same = torch.ones_like(lanes)
    words = philox((lanes & _LOW, lanes >> 32, same * stream, same * (step & _LOW)), seed)
    halves = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16)]
    bits = torch.stack([h.reshape(-1, 32) for h in halves], 1)  # [blocks, 8, 32]
    return bits.reshape(-1)[:numel].int()


def round_stochastic(x: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """A float32 x in bfloat16, up with a probability of what truncation would drop."""
    bits = x.contiguous().view(torch.int32).reshape(-1)
    random = random_bits(x.numel(), seed, stream, step, x.device)
    finite = x.reshape(-1).isfinite()
    rounded = torch.where(finite, bits + random, bits) & -65536
    rounded = torch.where(x.reshape(-1).isnan(), bits | 0x400000, rounded)
    return rounded.view(torch.float32).to(torch.bfloat16).reshape(x.shape)
