"""The road from sparse_linear to its CUDA C++ decode kernels (csrc/cuda/sparse_linear.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.sparse import COLUMNS, PANEL, SparseWeight, sizes
from bigops.kernels.common.tiles import device_arch
from bigops.ops import activation as act
from bigops.ops.library import define, rows

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


def serves(x: Tensor, values: Tensor) -> bool:
    """Whether these kernels serve a call on x's device."""
    return (
        not backend.cuda_error
        and _fits(x.dtype, x.shape[:-1].numel(), x.shape[-1], values.dtype)
        and backend.cuda_runs_on(device_arch(x.device))
    )


def serves_on(target: str, dtype: torch.dtype, m: int, k: int, stored: torch.dtype) -> bool:
    """Whether they serve such a call on ``target``: "cuda" or an architecture such as "sm_90"."""
    if not _fits(dtype, m, k, stored):
        return False
    if target == "cuda":
        if backend.cuda_error or not torch.cuda.is_available():
            return False
        target = device_arch(torch.device("cuda", torch.cuda.current_device()))
    return backend.cuda_runs_on(target)


def _fits(dtype: torch.dtype, m: int, k: int, stored: torch.dtype) -> bool:
    # Triton's kernel quantises the rows of x for int8 values.
    whole = stored != torch.int8 or (k < MAX_K and backend.has_triton())
    return dtype in DTYPES and 0 < m <= MAX_ROWS and whole


def name(dtype: torch.dtype, stored: torch.dtype) -> str:
    """The kernel's name, as `backend.record` gives it."""
    return f"cuda.sparse_linear.{checks.short(dtype)}.{checks.short(stored)}"


def forward(x: Tensor, *args: Any) -> Tensor:
    """`sparse_linear` on x of any rank, at most 16 rows; the arguments of the op.

    The contents of the storage are checked on the device as they are read: broken ones give NaN.
    """
    values, index, rows_of, _, ptr, scale, sums, n, chunk, bias, residual, activation = args
    flat, k = rows(x), x.shape[-1]
    x_scale = x_zero = None
    seen = flat
    if scale is not None:
        from bigops.kernels.quantized_linear.rows import quantize_activations

        seen, x_scale, x_zero, _ = quantize_activations(flat, "dynamic")
    y = _decode(
        seen,
        x_scale,
        x_zero,
        x,
        values,
        index,
        rows_of,
        ptr,
        scale,
        sums,
        n,
        k,
        chunk,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
        splits_for(n, k, chunk, values.dtype),
    )
    backend.note(name(x.dtype, values.dtype))
    out: Tensor = y.view(*x.shape[:-1], n)
    return out


def explain(dtype: torch.dtype, m: int, weight: SparseWeight) -> tuple[str, str, dict[str, Any]]:
    """(kernel, reason, config) of a call that these kernels serve."""
    (n, k), chunk, stored = weight.shape, weight.chunk, weight.values.dtype
    config = {
        "block_n": chunk,
        "block_k": PANEL * COLUMNS[stored],
        "splits": splits_for(n, k, chunk, stored),
    }
    kind = checks.short(stored)
    reason = f"sparse decode of {m} rows, at most {MAX_ROWS}: {kind} words in slices of 16 rows"
    return name(dtype, stored), reason, config
