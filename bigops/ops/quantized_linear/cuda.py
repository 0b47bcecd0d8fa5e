"""The road from quantized_linear to its CUDA C++ decode kernels (csrc/cuda/quantized_linear.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.quantized import QuantizedWeight, columns_of
from bigops.kernels.common.tiles import device_arch
from bigops.ops import activation as act
from bigops.ops.library import define, rows

MAX_ROWS = 16  # of x: two products of 8 columns each
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_ROWS = 64  # weight rows of a block
_LINES = 32  # lines of the storage in a stage
_BLOCKS = 512  # four for each multiprocessor of a large device
_LEAST_STAGES = 4  # of a block's share of K: what its pipeline holds
_MOST_SPLITS = 16

_decode = define(
    "quantized_linear_decode(Tensor x, Tensor values, Tensor scale, Tensor? zero_point, int pad, "
    "int k, int bits, int group, Tensor? bias, Tensor? residual, str activation, int splits) -> "
    "Tensor"
)  # the kernel by itself, for a GPU only; `quantized_linear` has its reference and gradients


def splits_for(n: int, k: int, bits: int) -> int:
    """Blocks that share K, so that a narrow layer fills a device as well.

    The shape alone decides, so that sums are the same to the bit on every device.
    """
    blocks = -(-n // _BLOCK_ROWS)
    stages = -(-k // (_LINES * columns_of(bits)))
    return max(1, min(_BLOCKS // max(blocks, 1), stages // _LEAST_STAGES, _MOST_SPLITS))


def serves(x: Tensor, activations: str) -> bool:
    """Whether these kernels serve a call on x's device."""
    return (
        not backend.cuda_error
        and _fits(x.dtype, x.shape[:-1].numel(), activations)
        and backend.cuda_runs_on(device_arch(x.device))
    )


def serves_on(target: str, dtype: torch.dtype, m: int, activations: str) -> bool:
    """Whether they serve such a call on ``target``: "cuda" or an architecture such as "sm_90"."""
    if not _fits(dtype, m, activations):
        return False
    if target == "cuda":
        if backend.cuda_error or not torch.cuda.is_available():
            return False
        target = device_arch(torch.device("cuda", torch.cuda.current_device()))
    return backend.cuda_runs_on(target)


def _fits(dtype: torch.dtype, m: int, activations: str) -> bool:
    return dtype in DTYPES and 0 < m <= MAX_ROWS and activations == "none"


def name(dtype: torch.dtype, bits: int) -> str:
    """The kernel's name, as `backend.record` gives it."""
    return f"cuda.quantized_linear.{checks.short(dtype)}.w{bits}"


def forward(x: Tensor, *args: Any) -> Tensor:
    """`quantized_linear` on x of any rank, at most 16 rows; the arguments of the op."""
    *fixed, bias, residual, activation = args
    weight = QuantizedWeight.of(*fixed)
    y = _decode(
        rows(x),
        weight.values,
        weight.scale,
        weight.zero_point,
        -weight.n % 16,
        weight.k,
        weight.bits,
        weight.group,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
        splits_for(weight.n, weight.k, weight.bits),
    )
    backend.note(name(x.dtype, weight.bits))
    out: Tensor = y.view(*x.shape[:-1], weight.n)
    return out


def explain(dtype: torch.dtype, m: int, weight: QuantizedWeight) -> tuple[str, dict[str, Any], str]:
    """(kernel, config, reason) of a call that these kernels serve."""
    splits = splits_for(weight.n, weight.k, weight.bits)
    config = {
        "block_n": _BLOCK_ROWS,
        "block_k": _LINES * columns_of(weight.bits),
        "splits": splits,
    }
    reason = f"weight-only decode of {m} rows, at most {MAX_ROWS}: int{weight.bits} by mma.sync"
    return name(dtype, weight.bits), config, reason
