"""Random numbers that are a function of (seed, epoch, sample), whatever the batch, worker or rank.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
2014) started at a hash of the three; whole numbers of 64 bits that wrap, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """A whole number as int64 holds its lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # int64 shifts its sign in


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def keys(seed: int, epoch: int, samples: Tensor) -> Tensor:
    """A key for each sample, int64 of the shape and device of ``samples``."""
    key = torch.full_like(samples, _signed(seed), dtype=torch.int64)
    for part in (epoch, samples):
        key = _mixed(_mixed(key + _GAMMA) + part)
    return key


def uniform(seed: int, epoch: int, samples: Tensor, count: int) -> Tensor:
    """``count`` numbers for each sample, float64 [samples, count], uniform in [0, 1)."""
    steps = torch.arange(1, count + 1, device=samples.device)
    bits = _mixed(keys(seed, epoch, samples)[:, None] + steps * _GAMMA)
    return _shifted(bits, 11).double() * 2.0**-53
