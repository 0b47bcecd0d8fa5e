"""The path from quantized_linear to its CUDA C++ decode kernels (csrc/cuda/quantized_linear.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.quantized import QuantizedWeight, columns_of
from bigops.ops import targets
from bigops.ops.family import Call
from bigops.ops.library import define

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


def serves(call: Call, weight: QuantizedWeight, target: targets.Target) -> bool:
    """Whether these kernels serve a call on ``target``."""
    return (
        call.x.dtype in DTYPES
        and 0 < call.rows <= MAX_ROWS
        and weight.activations == "none"
        and targets.cuda_arch(target) is not None
    )


def name(call: Call, weight: QuantizedWeight) -> str:
    """The kernel's name, as `backend.record` gives it."""
    return f"cuda.quantized_linear.{checks.short(call.x.dtype)}.w{weight.bits}"


def forward(call: Call) -> Tensor:
    """`quantized_linear` on x of any rank, at most 16 rows."""
    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, QuantizedWeight)
    y: Tensor = _decode(
        rows(x),
        weight.values,
        weight.scale,
        weight.zero_point,
        weight.pad,
        weight.k,
        weight.bits,
        weight.group,
        call.bias,
        None if residual is None else rows(residual),
        call.code,
        splits_for(weight.n, weight.k, weight.bits),
    )
    backend.note(name(call, weight))
    return y.view(*x.shape[:-1], weight.n)


def said(call: Call, weight: QuantizedWeight) -> tuple[str, dict[str, Any]]:
    """(reason, config) of a call that these kernels serve."""
    config = {
        "block_n": _BLOCK_ROWS,
        "block_k": _LINES * columns_of(weight.bits),
        "splits": splits_for(weight.n, weight.k, weight.bits),
    }
    reason = f"weight-only decode of {call.rows} rows, at most {MAX_ROWS}: int{weight.bits}"
    return f"{reason} by mma.sync", config
