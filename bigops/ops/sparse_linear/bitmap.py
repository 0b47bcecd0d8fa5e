"""The op under `sparse_linear` for a weight that is stored as a bitmap (`bigops.formats.bitmap`).

Made for the few rows of x of a decode step on NVIDIA GPUs, where the time is that of reading W.

Reference, op (schema, fake, autograd, vmap come from `bigops.ops.family`), dispatch, public
function, in that order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.formats import bitmap as storage
from bigops.formats import checks
from bigops.formats.bitmap import BitmapWeight
from bigops.kernels.common.tiles import device_arch
from bigops.ops import activation as act
from bigops.ops import family as _frozen
from bigops.ops.library import define, register, rows

MAX_ROWS = 16  # of x
_BLOCKS = 512  # four for each multiprocessor of a large device
_BLOCK_N = 32  # rows of W of a block
_LEAST_PANELS = 4  # of a block: the pipeline of copies is two tiles deep
_MOST_SPLITS = 16

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    ptr: Tensor,
    n: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `bitmap_linear` in plain torch."""
    z = F.linear(x.float(), storage.to_dense(values, bits, ptr, n, x.shape[-1]))
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(x: Tensor, values: Tensor, bits: Tensor, ptr: Tensor, n: int) -> Tensor:
    return storage.to_dense(values, bits, ptr, n, x.shape[-1])


def check(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    ptr: Tensor,
    n: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    if x.dim() == 0:
        raise ValueError("x: expected shape [.., K]; got []")
    k = x.shape[-1]
    storage.check_storage(values, bits, ptr, n, k)
    _frozen.check_call(x, n, k, bias, residual, activation, (values.dtype,))
    for name, t in (("values", values), ("bits", bits), ("ptr", ptr)):
        checks.device(name, t, x)


# --- op ------------------------------------------------------------------------------------


class _BitmapLinear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *fixed: object) -> int:
        n = fixed[3]
        assert isinstance(n, int | torch.SymInt)
        return n  # type: ignore[return-value]

    def _serve(self, x, *rest):  # type: ignore[no-untyped-def]
        self.check(x, *rest)
        values, bits, ptr, n, *_ = rest
        storage.check_structure(values, bits, ptr, n, x.shape[-1])
        return super()._serve(x, *rest)


_op = _BitmapLinear(
    "bitmap_linear",
    "Tensor values, Tensor bits, Tensor ptr, SymInt n",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *fixed: False,
)
reference_backward = _op.reference_backward

_decode = define(
    "bitmap_linear_decode(Tensor x, Tensor values, Tensor bits, Tensor ptr, int n, Tensor? bias, "
    "Tensor? residual, str activation, int splits) -> Tensor"
)  # the kernel by itself, for a GPU only; `bitmap_linear` has its reference and gradients


# --- dispatch ------------------------------------------------------------------------------
# The kernel serves up to 16 rows of x where it is built; the backward is the reference everywhere.


def splits_for(n: int, k: int) -> int:
    """Blocks that share the panels of their rows, so that a device is full.

    The shape alone decides, so that sums are the same to the bit on every device.
    """
    panels = storage.tiles_of(n, k)[1]
    blocks = _BLOCKS // max(-(-n // _BLOCK_N), 1)
    return max(1, min(blocks, panels // _LEAST_PANELS, _MOST_SPLITS))


def _forward(x: Tensor, *args: Any) -> Tensor:
    """The op by the kernel; x of any rank, at most 16 rows.

    The contents of the storage are checked on the device as they are read: broken ones give NaN.
    """
    values, bits, ptr, n, bias, residual, activation = args
    flat = rows(x)
    y = _decode(
        flat,
        values,
        bits,
        ptr,
        n,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
        splits_for(n, x.shape[-1]),
    )
    backend.note(_name(x.dtype))
    out: Tensor = y.view(*x.shape[:-1], n)
    return out


def _name(dtype: torch.dtype) -> str:
    return f"cuda.bitmap_linear.{checks.short(dtype)}"


def serves(x: Tensor) -> bool:
    """Whether the kernel serves x on its device, with values of its dtype."""
    return (
        x.is_cuda
        and not backend.cuda_error
        and x.dtype in storage.DTYPES
        and 0 < x.shape[:-1].numel() <= MAX_ROWS
        and backend.cuda_runs_on(device_arch(x.device))
    )


def _cuda(x: Tensor, *args: Any) -> Tensor:
    check(x, *args)
    if serves(x):
        return _forward(x, *args)
    return _op._serve(x, *args)


register(_op.forward, cuda=_cuda)


def _check_weight_shape(x: Tensor, weight: BitmapWeight) -> None:
    # The storage is filled up, so that it does not say where K ends.
    checks.tensors(x=x)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
        )


def explain(
    x: Tensor,
    weight: BitmapWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> backend.Explanation:
    """Which kernel serves such a call of `sparse_linear`."""
    _check_weight_shape(x, weight)
    (n, k), m = weight.shape, x.shape[:-1].numel()
    _op.check(x, *weight.tensors, n, bias, residual, activation)
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    if target == "cuda" and torch.cuda.is_available() and not backend.cuda_error:
        target = device_arch(torch.device("cuda", torch.cuda.current_device()))
    plain = "the product with the unpacked weight by torch serves; gradients likewise"
    if backend.cuda_runs_on(target) and 0 < m <= MAX_ROWS:
        config = {"block_k": storage.COLUMNS, "splits": splits_for(n, k)}
        reason = f"bitmap decode of {m} rows, at most {MAX_ROWS}; gradients come from torch"
        return backend.Explanation("sparse_linear", _name(x.dtype), reason, config)
    if target == "cpu":
        why = "made for GPUs, the general storage has CPU kernels"
    elif not 0 < m <= MAX_ROWS:
        why = f"{m} rows, 1 to {MAX_ROWS} have a kernel"
    else:
        why = backend.cuda_error or f"the CUDA C++ kernels are not built for {target}"
    return backend.Explanation("sparse_linear", "reference.bitmap_linear", f"{why}; {plain}")


def apply(
    x: Tensor,
    weight: BitmapWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`sparse_linear` of such a weight.

    The kernel multiplies nothing where no bit is set, so NaN and infinity of x do not spread there;
    the reference, which multiplies by zero, gives NaN. Gradients for x, bias and residual come from
    torch's product with the unpacked weight; the weight has none.
    """
    _check_weight_shape(x, weight)
    return _op.apply(x, *weight.tensors, weight.shape[0], bias, residual, activation)
