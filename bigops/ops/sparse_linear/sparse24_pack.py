"""The CUDA kernels around the product of 2:4 weights: pack, its transpose, gradient of values.

They are in csrc/cuda (sparse24_pack, sparse24_gradient); the kernels check no contents. The
layout and the meaning of each in plain torch are in `bigops.formats.sparse24`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import checks
from bigops.formats.patterns import n_m_mask, transposable_mask
from bigops.formats.sparse24 import Sparse24Weight, check_pack, uneven
from bigops.kernels.common.tiles import device_arch
from bigops.ops.library import define, encoder

SOURCES = (torch.float32, torch.bfloat16, torch.float16)  # of a dense weight
STORED = (torch.bfloat16, torch.float16)

_pack = define(
    "sparse24_pack(Tensor w, Tensor? mask, str choice, str dtype, bool transposable) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_encoded = encoder(_pack)
_transpose = define(
    "sparse24_transpose(Tensor values, Tensor meta, Tensor meta_t, int k) -> Tensor"
)
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
        and not machine.cuda_error
        and machine.cuda_runs_on(device_arch(w.device))
    )


def pack(
    w: Tensor, mask: Tensor | None, choice: str, stored: torch.dtype, transposable: bool
) -> Packed:
    """Pack w [N, K] by the kernel: what ``choice`` "given" (by the mask) or "largest" keeps."""
    dtype = checks.short(stored)
    found = _pack(*_encoded((w, mask, choice, dtype, transposable)))
    backend.note(f"cuda.sparse24_pack.{checks.short(w.dtype)}.{dtype}")
    return Packed(*found)


def transpose(values: Tensor, meta: Tensor, meta_t: Tensor, k: int) -> Tensor:
    """The values [K, N' / 2] of the transpose of a transposable weight [N, k]."""
    out: Tensor = _transpose(values, meta, meta_t, k)
    backend.note(f"cuda.sparse24_transpose.{checks.short(values.dtype)}")
    return out


def gradient(gz: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """gz^T x where the weight stores values; gz [M, N], x [M, K]."""
    out: Tensor = _gradient(gz, x, meta)
    backend.note(f"cuda.sparse24_gradient.{checks.short(x.dtype)}")
    return out


def pack24(
    w: Tensor,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    transposable: bool = False,
) -> Sparse24Weight:
    """Compress a matrix that is 2:4 sparse; on any device, on an NVIDIA GPU by a kernel.

    Args:
        w: ``[N, K]``, any floating dtype.
        mask: bool ``[N, K]``, True where an entry is kept, as `n_m_mask` and `transposable_mask`
            give it; None keeps what is not exactly 0.
        dtype: of the stored values: bfloat16, float16, or int8 (one symmetric scale a row); None
            keeps a 16-bit dtype and takes bfloat16 for the rest.
        transposable: with the metadata of the transpose, for training: the mask keeps two of each
            four neighbours along rows and columns; not with int8.

    Raises:
        ValueError: more than two of four neighbours are kept, or with ``transposable`` not just
            two; mask of another shape, w no matrix, or NaN or inf in it.
        TypeError: w is no floating tensor, mask no bool, or a dtype that is not stored.
    """
    dtype = check_pack(w, dtype, transposable)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a torch.Tensor; got {type(mask).__name__}")
        checks.dtype("mask", mask, torch.bool)
        checks.shape("mask", mask, list(w.shape))
        checks.device("mask", mask, w)
    if serves(w, dtype) and not (transposable and uneven(w)):
        packed = pack(w.detach(), mask, "given", dtype, transposable)
        if not bool(packed.broken.any()):  # else the path below names what is wrong
            return _of_kernel(packed, w, transposable)
    return Sparse24Weight.from_mask(w, w != 0 if mask is None else mask, dtype, transposable)


def prune24(
    w: Tensor, dtype: torch.dtype | None = None, transposable: bool = False
) -> Sparse24Weight:
    """Choose what to keep of a matrix and compress it, in one pass on an NVIDIA GPU.

    Args:
        w: ``[N, K]``, any floating dtype; with ``transposable`` N and K divide by 4.
        dtype: as for `pack24`.
        transposable: keep what `transposable_mask` keeps, and the metadata of the transpose, for
            training; else what `n_m_mask` keeps.

    Raises:
        ValueError, TypeError: as `pack24`.
    """
    dtype = check_pack(w, dtype, transposable)
    if serves(w, dtype) and not (transposable and uneven(w)):
        packed = pack(w.detach(), None, "largest", dtype, transposable)
        return _of_kernel(packed, w, transposable)
    return Sparse24Weight.from_mask(
        w, transposable_mask(w) if transposable else n_m_mask(w), dtype, transposable
    )


def _of_kernel(packed: Packed, w: Tensor, transposable: bool) -> Sparse24Weight:
    k = w.shape[1]
    meta_t = packed.meta_t if transposable else None
    return Sparse24Weight(packed.values, packed.meta, None, None, meta_t, k)
