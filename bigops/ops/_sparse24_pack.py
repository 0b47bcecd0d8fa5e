"""The CUDA kernels around the product of 2:4 weights: pack, its transpose, gradient of values.

They are in csrc/cuda (sparse24_pack, sparse24_gradient); nothing here checks contents. Layout:
`_sparse24_weight`. The meaning of each in plain torch is `_sparse24_weight._compress`,
`_sparse24_weight.turn` and `_sparse24_weight.sample`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops import backend
from bigops.kernels.tiles import device_arch
from bigops.ops import _checks as checks
from bigops.ops._library import define, encoder

SOURCES = (torch.float32, torch.bfloat16, torch.float16)  # of a dense weight
STORED = (torch.bfloat16, torch.float16)

_pack = define(
    "sparse24_pack(Tensor w, Tensor? mask, str choice, str dtype, bool transposable) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_encoded = encoder(_pack)
_turn = define("sparse24_turn(Tensor values, Tensor meta, Tensor meta_t, int k) -> Tensor")
_gradient = define("sparse24_gradient(Tensor gz, Tensor x, Tensor meta) -> Tensor")


class Packed(NamedTuple):
    """What the packing kernel writes for a weight [N, K]."""

    values: Tensor
    meta: Tensor
    values_t: Tensor  # of the transpose, [K, N' / 2]; no rows unless it was asked for
    meta_t: Tensor
    broken: Tensor  # int32, an entry a tile: not 0 where a four could not be kept, which is NaN


def serves(w: Tensor, stored: torch.dtype) -> bool:
    """Whether the packing kernel serves w on its device. It needs no sparse tensor cores."""
    return (
        w.is_cuda
        and w.dtype in SOURCES
        and stored in STORED
        and not backend.cuda_error
        and backend.cuda_runs_on(device_arch(w.device))
    )


def pack(
    w: Tensor, mask: Tensor | None, choice: str, stored: torch.dtype, transposable: bool
) -> Packed:
    """Pack w [N, K] by the kernel: what ``choice`` "given" (by the mask) or "largest" keeps."""
    dtype = checks.short(stored)
    found = _pack(*_encoded((w, mask, choice, dtype, transposable)))
    backend.note(f"cuda.sparse24_pack.{checks.short(w.dtype)}.{dtype}")
    return Packed(*found)


def turn(values: Tensor, meta: Tensor, meta_t: Tensor, k: int) -> Tensor:
    """The values [K, N' / 2] of the transpose of a transposable weight [N, k]."""
    out: Tensor = _turn(values, meta, meta_t, k)
    backend.note(f"cuda.sparse24_turn.{checks.short(values.dtype)}")
    return out


def gradient(gz: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """gz^T x where the weight stores values; gz [M, N], x [M, K]."""
    out: Tensor = _gradient(gz, x, meta)
    backend.note(f"cuda.sparse24_gradient.{checks.short(x.dtype)}")
    return out
