"""The op under `sparse_linear` for a weight that is stored as a bitmap (`BitmapWeight`).

Made for the few rows of x of a decode step on NVIDIA GPUs, where the time is that of reading W. The
kernel multiplies nothing where no bit is set, so NaN and infinity of x do not spread there; the
reference, which multiplies by zero, gives NaN. Gradients for x, bias and residual come from torch's
product with the unpacked weight; the weight has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import bitmap as storage
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.bitmap import BitmapWeight
from bigops.ops import targets
from bigops.ops.choice import Choice, reference
from bigops.ops.family import Call, LinearOp
from bigops.ops.library import define
from bigops.ops.targets import Target

MAX_ROWS = 16  # of x
_BLOCKS = 512  # four for each multiprocessor of a large device
_BLOCK_N = 32  # rows of W of a block
_LEAST_PANELS = 4  # of a block: the pipeline of copies is two tiles deep
_MOST_SPLITS = 16

_decode = define(
    "bitmap_linear_decode(Tensor x, Tensor values, Tensor bits, Tensor ptr, int n, Tensor? bias, "
    "Tensor? residual, str activation, int splits) -> Tensor"
)  # the kernel by itself, for a GPU only; `bitmap_linear` has its reference and gradients


def splits_for(n: int, k: int) -> int:
    """Blocks that share the panels of their rows, so that a device is full.

    The shape alone decides, so that sums are the same to the bit on every device.
    """
    panels = storage.tiles_of(n, k)[1]
    blocks = _BLOCKS // max(-(-n // _BLOCK_N), 1)
    return max(1, min(blocks, panels // _LEAST_PANELS, _MOST_SPLITS))


def serves(rows: int, target: Target) -> bool:
    """Whether the kernel serves a call with so many rows of x on ``target``."""
    return 0 < rows <= MAX_ROWS and targets.cuda_arch(target) is not None


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    if serves(call.rows, target):
        return Choice("sparse_linear", _name(call), lambda: _said(call), _forward)
    if targets.is_cpu(target):
        why = "made for GPUs, the general storage has CPU kernels"
    elif not 0 < call.rows <= MAX_ROWS:
        why = f"{call.rows} rows, 1 to {MAX_ROWS} have a kernel"
    else:
        why = machine.cuda_error or f"the CUDA C++ kernels are not built for {target}"
    plain = "the product with the unpacked weight by torch serves; gradients likewise"
    return reference("sparse_linear", f"{why}; {plain}", "bitmap_linear")


def _name(call: Call) -> str:
    return f"cuda.bitmap_linear.{checks.short(call.x.dtype)}"


def _said(call: Call) -> tuple[str, dict[str, Any]]:
    config = {
        "block_k": storage.COLUMNS,
        "splits": splits_for(call.weight.n, call.weight.k),
    }
    reason = f"bitmap decode of {call.rows} rows, at most {MAX_ROWS}; gradients come from torch"
    return reason, config


def _forward(call: Call) -> Tensor:
    """The op by the kernel; x of any rank, at most 16 rows.

    The contents of the storage are checked on the device as they are read: broken ones give NaN.
    """
    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, BitmapWeight)
    y: Tensor = _decode(
        rows(x),
        weight.values,
        weight.bits,
        weight.ptr,
        weight.n,
        call.bias,
        None if residual is None else rows(residual),
        call.code,
        splits_for(weight.n, weight.k),
    )
    backend.note(_name(call))
    return y.view(*x.shape[:-1], weight.n)


op = LinearOp("bitmap_linear", BitmapWeight, choose=choose)
