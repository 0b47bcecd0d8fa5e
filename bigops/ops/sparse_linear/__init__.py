"""sparse_linear: y = act(x W^T + bias) + residual, W sparse with int8, bfloat16 or float32 values.

Any pattern is stored (unstructured, blocks of any shape, N:M); layout: `bigops.formats.sparse`,
conversion: `bigops.formats.sparse_convert`. 2:4 has a form of its own for sparse tensor cores
besides (`bigops.formats.sparse24`), which `from_sparse` makes; its op is in `sparse24`. Floating
values have one of fewer bytes for decode steps on a GPU (`bigops.formats.bitmap`, op in `bitmap`).

Reference, op (schema, fake, autograd, vmap come from `bigops.ops.family`), dispatch, public
function, in that order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.backend import machine
from bigops.formats import checks, quantize
from bigops.formats import sparse as storage
from bigops.formats.bitmap import BitmapWeight, bitmap_from_sparse, pack_bitmap
from bigops.formats.sparse import TENSORS, SparseWeight
from bigops.formats.sparse24 import Sparse24Weight, from_sparse
from bigops.formats.sparse_convert import (
    Pattern,
    block_mask,
    from_dense,
    n_m_mask,
    sparsify_weight,
    transposable_mask,
)
from bigops.ops import activation as act
from bigops.ops import family as _frozen
from bigops.ops.explain import Explanation, serves
from bigops.ops.grid import GridLinear
from bigops.ops.library import register
from bigops.ops.sparse_linear import bitmap as _bitmap
from bigops.ops.sparse_linear import cuda as _decode
from bigops.ops.sparse_linear import sparse24 as _sparse24
from bigops.ops.sparse_linear import triton as _triton
from bigops.ops.sparse_linear.sparse24_pack import pack24, prune24

__all__ = [
    "BitmapWeight",
    "Pattern",
    "Sparse24Weight",
    "SparseWeight",
    "bitmap_from_sparse",
    "block_mask",
    "from_dense",
    "from_sparse",
    "n_m_mask",
    "pack24",
    "pack_bitmap",
    "prune24",
    "reference",
    "reference_grid",
    "sparse_linear",
    "sparsify_weight",
    "transposable_mask",
]

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    rows: Tensor,
    length: Tensor,
    ptr: Tensor,
    scale: Tensor | None,
    sums: Tensor | None,
    n: int,
    chunk: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `sparse_linear` in plain torch."""
    fixed = (values, index, rows, length, ptr, scale, sums, n, chunk)
    return _compute(x, *fixed, None, bias, residual, activation).to(x.dtype)


def _compute(  # type: ignore[no-untyped-def]
    x: Tensor, values, index, rows, length, ptr, scale, sums, n, chunk, x_grid, bias, residual,
    activation: str,
) -> Tensor:  # fmt: skip
    w = _matrix(x, values, index, rows, length, ptr, n, chunk)
    if scale is None:
        z = F.linear(x.float(), w)
    else:
        seen = quantize.quantize_rows(x, "dynamic" if x_grid is None else "static", x_grid)
        # whole numbers below 2^53: the product is exact, in whatever order it is summed
        total = torch.matmul((seen.q - seen.zero_point).double(), w.double().t()).float()
        z = total * (seen.scale * scale)
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y


def _matrix(  # type: ignore[no-untyped-def]
    x: Tensor, values, index, rows, length, ptr, n: int, chunk: int
) -> Tensor:
    k = x.shape[-1]
    at = storage.positions(values, index, rows, length, ptr, k, chunk)
    return storage.to_dense(values, at, n, k, chunk)


def _dense(x, values, index, rows, length, ptr, scale, sums, n, chunk):  # type: ignore[no-untyped-def]
    w = _matrix(x, values, index, rows, length, ptr, n, chunk)
    return w if scale is None else w * scale.unsqueeze(1)


def _sample(g, x, values, index, rows, length, ptr, scale, sums, n, chunk):  # type: ignore[no-untyped-def]
    at = storage.positions(values, index, rows, length, ptr, x.shape[-1], chunk)
    return storage.sample(g, at, chunk, values.dtype)


def check(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    rows: Tensor,
    length: Tensor,
    ptr: Tensor,
    scale: Tensor | None,
    sums: Tensor | None,
    n: int,
    chunk: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    if x.dim() == 0:
        raise ValueError("x: expected shape [.., K]; got []")
    k = x.shape[-1]
    served = (torch.bfloat16,) if values.dtype == torch.bfloat16 else quantize.SERVED
    _frozen.check_call(x, n, k, bias, residual, activation, served)
    tensors = (values, index, rows, length, ptr, scale, sums)
    storage.check_storage(*tensors, n, chunk, k)
    for name, t in zip(TENSORS, tensors, strict=True):
        if t is not None:
            checks.device(name, t, x)


# --- op ------------------------------------------------------------------------------------


class _SparseLinear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *fixed: object) -> int:
        n = fixed[7]
        assert isinstance(n, int | torch.SymInt)
        return n  # type: ignore[return-value]

    def _serve(self, x, *rest):  # type: ignore[no-untyped-def]
        self.check(x, *rest)
        storage.check_structure(*rest[:5], *rest[7:9], x.shape[-1])  # type: ignore[call-arg]
        return super()._serve(x, *rest)


class _SparseGrid(GridLinear):
    def _serve(self, *args):  # type: ignore[no-untyped-def]
        self.check(*args)
        storage.check_structure(*args[1:6], *args[8:10], args[0].shape[-1])  # type: ignore[call-arg]
        return super()._serve(*args)


_op = _SparseLinear(
    "sparse_linear",
    "Tensor values, Tensor index, Tensor rows, Tensor length, Tensor ptr, Tensor? scale, "
    "Tensor? sums, SymInt n, int chunk",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *fixed: fixed[5] is not None,
    sample=_sample,
)
reference_backward = _op.reference_backward
_grid = _SparseGrid(
    _op, ("x_grid", "y_grid"), compute=_compute, quantises=lambda *fixed: fixed[5] is not None
)
reference_grid = _grid.reference


# --- dispatch ------------------------------------------------------------------------------
# The CPU kernels register themselves (csrc/cpu/sparse_linear.cpp). On a GPU a few rows of x, as in
# a decode step, have a CUDA C++ kernel for every pattern; more of them a Triton kernel where the
# weight has blocks. The twin with grids is the reference, as `backend.record` says, and so is what
# `_triton.blocks_of` gives a reason for.


def _cuda(x, *args):  # type: ignore[no-untyped-def]
    check(x, *args)
    if _decode.serves(x, args[0]):
        return _decode.forward(x, *args)
    blocks, _ = _triton.blocks_of(x, x.device, *args[: _op.fixed])
    return _op._serve(x, *args) if blocks is None else _triton.forward(x, blocks, *args)


def _cuda_backward(grad, x, *args):  # type: ignore[no-untyped-def]
    blocks, _ = _triton.blocks_of(x, x.device, *args[: _op.fixed])
    if blocks is None:
        return _op._serve_backward(grad, x, *args)
    return _triton.backward(grad, x, blocks, *args)


register(_op.forward, cuda=_cuda)
register(_op.backward, cuda=_cuda_backward)


def _check_weight_shape(x: Tensor, weight: SparseWeight) -> None:
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
        )


def _check_no_grid(weight: Sparse24Weight | BitmapWeight, *grids: Tensor | None) -> None:
    if any(grid is not None for grid in grids):
        kind = "compressed to 2:4" if isinstance(weight, Sparse24Weight) else "stored as a bitmap"
        raise ValueError(f"x_grid, y_grid: expected None with a weight {kind}")


@serves("sparse_linear")
def _explain(
    x: Tensor,
    weight: SparseWeight | Sparse24Weight | BitmapWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
    *,
    x_grid: Tensor | None = None,
    y_grid: Tensor | None = None,
) -> Explanation:
    if isinstance(weight, Sparse24Weight):
        _check_no_grid(weight, x_grid, y_grid)
        return _sparse24.explain(x, weight, bias, residual, activation, device)
    if isinstance(weight, BitmapWeight):
        _check_no_grid(weight, x_grid, y_grid)
        return _bitmap.explain(x, weight, bias, residual, activation, device)
    checks.stored(weight, SparseWeight, "sparsify_weight")
    _check_weight_shape(x, weight)
    fixed = (*weight.tensors, weight.shape[0], weight.chunk)
    if x_grid is None and y_grid is None and x.dtype != torch.uint8:
        _op.check(x, *fixed, bias, residual, activation)
    else:
        _grid.check(x, *fixed, x_grid, y_grid, bias, residual, activation)
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    m = x.shape[:-1].numel()
    if target != "cpu":
        return _explain_gpu(target, m, x, weight, x_grid is not None or y_grid is not None)
    stored = checks.short(weight.values.dtype)
    extension = machine.extension

    def choose() -> tuple[str, str]:
        return extension.choose_sparse_linear(  # type: ignore
            m, stored, checks.short(x.dtype), y_grid is not None
        )

    return _frozen.explain("sparse_linear", x, device, choose if extension else None)


def _explain_gpu(target: str, m: int, x: Tensor, weight: SparseWeight, grids: bool) -> Explanation:
    fixed = (*weight.tensors, weight.shape[0], weight.chunk)
    if not grids and _decode.serves_on(target, x.dtype, m, weight.shape[1], weight.values.dtype):
        return Explanation("sparse_linear", *_decode.explain(x.dtype, m, weight))
    blocks, reason = _triton.blocks_of(x, target, *fixed)
    if grids:
        reason = "no GPU kernel for a call with grids"
    elif blocks is not None:
        return _triton.explain(target, x, blocks, *fixed)
    kernel = f"reference.sparse_linear{'_grid' if grids else ''}"
    return Explanation("sparse_linear", kernel, f"{reason}; plain torch serves")


# --- public function -----------------------------------------------------------------------


def sparse_linear(
    x: Tensor,
    weight: SparseWeight | Sparse24Weight | BitmapWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    x_grid: Tensor | None = None,
    y_grid: Tensor | None = None,
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W sparse; what is not stored costs nothing.

    With int8 values the rows of x are quantised at run time as in `quantized_linear` (a row with
    NaN or inf gives a row of NaN); floating values are multiplied in their precision and summed in
    float32.

    Grids are float32 ``[2]``, scale and zero point of u8 (`bigops.ops.quantized_linear.static_grid`
    makes them of a range). With ``y_grid`` the result is rounded to u8 in the same pass, as
    `quantized_linear` says; calls with a grid are for inference.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides; bfloat16 with bfloat16 values. Or
            uint8 on ``x_grid`` with int8 values.
        weight: `sparsify_weight` or `from_dense` of a ``[N, K]`` matrix; or, for the sparse tensor
            cores of sm_80 to sm_89, `prune24` or `pack24` of one or `from_sparse` of such a weight
            that is 2:4 sparse: it takes no grid, and x in the dtype of its floating values. NaN and
            infinity of x at zeros of W do not spread there. Or, for up to 16 rows of x on a GPU,
            `pack_bitmap` of a matrix or `bitmap_from_sparse`: no grid, x in its dtype, and it has
            no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        x_grid: with int8 values the grid of x, or None: a grid for each row, found at run time.
        y_grid: the grid of a uint8 result, or None.

    Returns:
        ``[.., N]``: uint8 with ``y_grid``, else in x's dtype (of a uint8 x in that of bias, without
        one of residual, without both float32). Gradients for x, bias and residual are those of the
        linear layer with the dequantised weight (straight through the rounding of x). Floating
        values that require it get theirs, at the stored positions only. Under `torch.autocast` x,
        bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, storage other
            than floating values that requires a gradient, a grid that is none, or with a grid
            anything that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: storage whose contents are broken (`SparseWeight.validate` says where), or NaN
            or inf in a y that was to become uint8.
    """
    if isinstance(weight, Sparse24Weight):
        _check_no_grid(weight, x_grid, y_grid)
        return _sparse24.apply(x, weight, bias, residual, activation)
    if isinstance(weight, BitmapWeight):
        _check_no_grid(weight, x_grid, y_grid)
        return _bitmap.apply(x, weight, bias, residual, activation)
    checks.stored(weight, SparseWeight, "sparsify_weight")
    n, k = weight.shape
    if x.shape[-1:] != (k,):
        checks.tensors(x=x)
        _check_weight_shape(x, weight)
    fixed = (*weight[:7], n, weight.chunk)
    if x_grid is None and y_grid is None and getattr(x, "dtype", None) is not torch.uint8:
        return _op.apply(x, *fixed, bias, residual, activation)
    return _grid.apply(x, *fixed, x_grid, y_grid, bias, residual, activation)
