"""The path from sparse_linear to its CUDA C++ decode kernels (csrc/cuda/sparse_linear.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse_layout import COLUMNS, PANEL, sizes
from bigops.ops import targets
from bigops.ops.family import Call
from bigops.ops.library import define

MAX_ROWS = 16  # of x
MAX_K = 2**17  # with int8 values: sums past that may not fit in int32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = 512  # four for each multiprocessor of a large device
_LEAST_PANELS = 2  # of a block
_MOST_SPLITS = 16

_decode = define(
    "sparse_linear_decode(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor like, Tensor values, "
    "Tensor index, Tensor rows, Tensor ptr, Tensor? scale, Tensor? sums, int n, int k, int chunk, "
    "Tensor? bias, Tensor? residual, str activation, int splits) -> Tensor"
)  # the kernel by itself, for a GPU only; `sparse_linear` has its reference and gradients


def splits_for(n: int, k: int, chunk: int, dtype: torch.dtype) -> int:
    """Blocks that share the panels of a chunk of rows, so that a device is full.

    The shape alone decides, so that sums are the same to the bit on every device.
    """
    size = sizes(n, k, chunk, dtype)
    blocks = _BLOCKS // max(size.chunks, 1)
    return max(1, min(blocks, size.panels // _LEAST_PANELS, _MOST_SPLITS))


def serves(call: Call, weight: SparseWeight, target: targets.Target) -> bool:
    """Whether these kernels serve a call on ``target``."""
    # Triton's kernel quantises the rows of x for int8 values.
    whole = not weight.rounds or (weight.k < MAX_K and machine.has_triton())
    return (
        call.x.dtype in DTYPES
        and 0 < call.rows <= MAX_ROWS
        and whole
        and targets.cuda_arch(target) is not None
    )


def name(call: Call, weight: SparseWeight) -> str:
    """The kernel's name, as `backend.record` gives it."""
    dtypes = f"{checks.short(call.x.dtype)}.{checks.short(weight.values.dtype)}"
    return f"cuda.sparse_linear.{dtypes}"


def forward(call: Call) -> Tensor:
    """`sparse_linear` on x of any rank, at most 16 rows.

    The contents of the storage are checked on the device as they are read: broken ones give NaN.
    """
    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, SparseWeight)
    seen, x_scale, x_zero = rows(x), None, None
    if weight.rounds:
        from bigops.kernels.quantized_linear.rows import quantize_activations

        seen, x_scale, x_zero, _ = quantize_activations(seen, "dynamic")
    y: Tensor = _decode(
        seen,
        x_scale,
        x_zero,
        x,
        weight.values,
        weight.index,
        weight.rows,
        weight.ptr,
        weight.scale,
        weight.sums,
        weight.n,
        weight.k,
        weight.chunk,
        call.bias,
        None if residual is None else rows(residual),
        call.code,
        splits_for(weight.n, weight.k, weight.chunk, weight.values.dtype),
    )
    backend.note(name(call, weight))
    return y.view(*x.shape[:-1], weight.n)


def said(call: Call, weight: SparseWeight) -> tuple[str, dict[str, Any]]:
    """(reason, config) of a call that these kernels serve."""
    stored = weight.values.dtype
    config = {
        "block_n": weight.chunk,
        "block_k": PANEL * COLUMNS[stored],
        "splits": splits_for(weight.n, weight.k, weight.chunk, stored),
    }
    reason = (
        f"sparse decode of {call.rows} rows, at most {MAX_ROWS}: {checks.short(stored)} words in "
        "slices of 16 rows"
    )
    return reason, config
