"""sparse_linear: y = act(x W^T + bias) + residual, W in 1x4 blocks of int8 or float32.

Storage is "panel CSR". Columns are cut into panels of 512, that is 128 blocks of 1 row by 4
columns; one panel of 64 activation rows stays in the L1 cache. Blocks lie panel by panel, and
within a panel row by row:

    panel_ptr  int32 [P * N + 1]   entry p * N + n: first block of row n in panel p
    index      uint8 [blocks]      block column within its panel, 0..127, rising within a row
    values     [blocks, 4]         int8 with ``scale`` float32 [N], or float32 with no scale

P = max(1, ceil(K / 512)); when K is no multiple of 4 the last block of a row ends in zeros.

Reference, op (schema, fake, autograd, vmap come from `_frozen`), conversion, dispatch, public
function, in that order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.ops import _activation as act
from bigops.ops import _checks as checks
from bigops.ops import _frozen
from bigops.ops import _quantize as quantize

BLOCK = 4  # columns of a block
PANEL = 512  # columns of a panel
PANEL_BLOCKS = PANEL // BLOCK


def panels(k: int) -> int:
    """Number of panels of a weight with ``k`` columns."""
    return max(1, (k + PANEL - 1) // PANEL)


# --- reference -----------------------------------------------------------------------------


def _scatter(values: Tensor, index: Tensor, panel_ptr: Tensor, n: int, k: int) -> Tensor:
    """The matrix [N, K] of stored values, in their dtype."""
    owner = torch.repeat_interleave(
        torch.arange(panels(k) * n, device=values.device),
        panel_ptr.diff().long(),
        output_size=values.shape[0],
    )
    blocks = (k + BLOCK - 1) // BLOCK
    dense = values.new_zeros((n, blocks, BLOCK))
    if n:
        dense[owner % n, owner // n * PANEL_BLOCKS + index.long()] = values
    return dense.reshape(n, blocks * BLOCK)[:, :k]


def reference(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    panel_ptr: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `sparse_linear` in plain torch."""
    n, k = _rows(x, panel_ptr), x.shape[-1]
    w = _scatter(values, index, panel_ptr, n, k)
    if scale is None:
        z = F.linear(x.float(), w)
    else:
        rows = quantize.quantize_rows(x)
        # whole numbers below 2^53: the product is exact, in whatever order it is summed
        total = torch.matmul((rows.q - rows.zero_point).double(), w.double().t()).float()
        z = total * (rows.scale * scale)
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(
    x: Tensor, values: Tensor, index: Tensor, panel_ptr: Tensor, scale: Tensor | None
) -> Tensor:
    w = _scatter(values, index, panel_ptr, _rows(x, panel_ptr), x.shape[-1]).float()
    return w if scale is None else w * scale.unsqueeze(1)


def _rows(x: Tensor, panel_ptr: Tensor) -> int:
    return (panel_ptr.shape[0] - 1) // panels(x.shape[-1])


def _check_storage(
    values: Tensor, index: Tensor, panel_ptr: Tensor, scale: Tensor | None, n: int, k: int
) -> None:
    """Dtypes and sizes, which every call checks."""
    checks.dtype("values", values, torch.float32 if scale is None else torch.int8)
    if values.dim() != 2 or values.shape[1] != BLOCK:
        raise ValueError(f"values: expected shape [blocks, 4]; got {list(values.shape)}")
    checks.dtype("index", index, torch.uint8)
    checks.shape("index", index, [values.shape[0]])
    checks.dtype("panel_ptr", panel_ptr, torch.int32)
    if panel_ptr.dim() != 1 or panel_ptr.shape[0] != panels(k) * n + 1:
        raise ValueError(
            f"panel_ptr: expected shape [{panels(k) * n + 1}] for {n} rows and {k} columns; "
            f"got {list(panel_ptr.shape)}"
        )
    if scale is not None:
        checks.shape("scale", scale, [n])
        checks.dtype("scale", scale, torch.float32)


def _check_structure(index: Tensor, panel_ptr: Tensor, n: int, k: int) -> None:
    """Contents that memory safety rests on; the C++ kernels check the same as they go."""
    first, last = int(panel_ptr[0]), int(panel_ptr[-1])
    if first != 0 or last != index.shape[0] or bool((panel_ptr.diff() < 0).any()):
        raise ValueError(
            f"panel_ptr: expected values that rise from 0 to {index.shape[0]}, the number of "
            f"blocks; got {first} to {last}"
            + ("" if (first, last) != (0, index.shape[0]) else ", falling in between")
        )
    for p in range(panels(k)):
        limit = min(PANEL_BLOCKS, (k + BLOCK - 1) // BLOCK - p * PANEL_BLOCKS)
        part = index[int(panel_ptr[p * n]) : int(panel_ptr[(p + 1) * n])]
        if part.numel() and int(part.max()) >= limit:
            raise ValueError(
                f"index: expected block columns below {limit} in panel {p}; got {int(part.max())}"
            )


def check(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    panel_ptr: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    if x.dim() == 0 or panel_ptr.dim() != 1 or panel_ptr.shape[0] == 0:
        raise ValueError(
            "x, panel_ptr: expected shapes [.., K] and [P * N + 1]; "
            f"got {list(x.shape)} and {list(panel_ptr.shape)}"
        )
    n, k = _rows(x, panel_ptr) if scale is None else scale.numel(), x.shape[-1]
    _frozen.check_call(x, n, k, bias, residual, activation, quantize.SERVED)
    _check_storage(values, index, panel_ptr, scale, n, k)
    for name, t in (
        ("values", values),
        ("index", index),
        ("panel_ptr", panel_ptr),
        ("scale", scale),
    ):
        if t is not None:
            checks.device(name, t, x)


def _serve(x, values, index, panel_ptr, *rest):  # type: ignore[no-untyped-def]
    _check_structure(index, panel_ptr, _rows(x, panel_ptr), x.shape[-1])
    return reference(x, values, index, panel_ptr, *rest)


# --- op ------------------------------------------------------------------------------------


class _SparseLinear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *storage: Tensor | None) -> int:
        _, _, panel_ptr, scale = storage
        assert panel_ptr is not None
        return _rows(x, panel_ptr) if scale is None else scale.shape[0]


_op = _SparseLinear(
    "sparse_linear",
    "Tensor values, Tensor index, Tensor panel_ptr, Tensor? scale",
    reference=_serve,
    dense=_dense,
    check=check,
    rounds=lambda values, index, panel_ptr, scale: scale is not None,
)
reference_backward = _op.reference_backward


# --- conversion ----------------------------------------------------------------------------


class SparseWeight(NamedTuple):
    """A block-sparse weight as it is stored and saved (layout: the head of this file)."""

    values: Tensor  # [blocks, 4] int8 or float32
    index: Tensor  # type: ignore[assignment]  # [blocks] uint8; tuple.index is not missed
    panel_ptr: Tensor  # [P * N + 1] int32
    scale: Tensor | None  # [N] float32 with int8 values
    shape: tuple[int, int]  # (N, K)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for."""
        w = _scatter(self.values, self.index, self.panel_ptr, *self.shape).float()
        return (w if self.scale is None else w * self.scale.unsqueeze(1)).to(dtype)

    @property
    def density(self) -> float:
        """Share of the blocks that are stored (1.0 for an empty matrix)."""
        blocks = self.shape[0] * ((self.shape[1] + BLOCK - 1) // BLOCK)
        return self.values.shape[0] / blocks if blocks else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        kept = (self.values, self.index, self.panel_ptr, self.scale)
        return sum(t.nbytes for t in kept if t is not None)

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the storage is whole (asked when a file loads)."""
        n, k = self.shape
        if n < 0 or k < 0:
            raise ValueError(f"shape: expected two sizes of at least 0; got {self.shape}")
        checks.tensors(
            values=self.values, index=self.index, panel_ptr=self.panel_ptr, scale=self.scale
        )
        for name in ("values", "index", "panel_ptr"):
            if getattr(self, name) is None:
                raise TypeError(f"{name}: expected a torch.Tensor; got None")
        _check_storage(self.values, self.index, self.panel_ptr, self.scale, n, k)
        _check_structure(self.index, self.panel_ptr, n, k)
        if self.scale is not None:
            if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
                raise ValueError("scale: expected finite values above 0")
        elif not bool(torch.isfinite(self.values).all()):
            raise ValueError("values: expected finite values; got NaN or inf")


def _blocks(w: Tensor) -> Tensor:
    """``w`` [N, K] as [N, ceil(K / 4), 4], padded with zeros."""
    return F.pad(w, (0, -w.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def block_mask(w: Tensor, sparsity: float) -> Tensor:
    """Choose the 1x4 blocks of ``w`` to keep: those of largest L2 norm over the whole matrix.

    Args:
        w: ``[N, K]``, any floating dtype.
        sparsity: share of blocks to drop, 0..1; ``round(sparsity * blocks)`` are dropped exactly.

    Returns:
        bool ``[N, ceil(K / 4)]``, True where the block is kept. Of equal norms the first stays.

    Raises:
        ValueError: sparsity outside 0..1, w no matrix, or NaN or inf in it.
        TypeError: w is no floating tensor.
    """
    quantize.check_weight(w)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a number from 0 to 1; got {sparsity}")
    norm = torch.linalg.vector_norm(_blocks(w.detach().double()), dim=-1)
    keep = norm.numel() - round(sparsity * norm.numel())
    order = norm.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(norm.numel(), dtype=torch.bool, device=w.device)
    mask[order[:keep]] = True
    return mask.view(norm.shape)


def sparsify_weight(w: Tensor, mask: Tensor, int8: bool) -> SparseWeight:
    """Store the blocks of ``w`` that ``mask`` keeps.

    Args:
        w: ``[N, K]``, any floating dtype.
        mask: bool ``[N, ceil(K / 4)]``, as `block_mask` gives it.
        int8: round the values to int8 with one symmetric scale per row; else keep float32.

    Raises:
        ValueError: mask of another shape, w no matrix, or NaN or inf in it.
        TypeError: w is no floating tensor, or mask no bool.
    """
    quantize.check_weight(w)
    n, k = w.shape
    checks.tensors(mask=mask)
    checks.dtype("mask", mask, torch.bool)
    checks.shape("mask", mask, [n, (k + BLOCK - 1) // BLOCK])
    kept = _blocks(w.detach().float()) * mask.unsqueeze(-1)  # [N, blocks, 4]
    scale = None
    if int8:
        scale = quantize.row_scales(kept)
        kept = quantize.to_int8(kept, scale.view(n, 1, 1))
    p = panels(k)
    spread = F.pad(mask, (0, p * PANEL_BLOCKS - mask.shape[1])).view(n, p, PANEL_BLOCKS)
    panel, row, block = spread.transpose(0, 1).nonzero(as_tuple=True)  # panel-major, then by row
    counts = spread.sum(-1).t().flatten()  # [P * N]
    if panel.numel() >= 2**31:
        raise ValueError(f"mask: expected fewer than 2**31 kept blocks; got {panel.numel()}")
    return SparseWeight(
        kept[row, panel * PANEL_BLOCKS + block].contiguous(),
        block.to(torch.uint8),
        F.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        scale,
        (n, k),
    )


# --- dispatch ------------------------------------------------------------------------------


def _check_weight_shape(x: Tensor, weight: SparseWeight) -> None:
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
        )


@backend.serves("sparse_linear")
def _explain(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> backend.Explanation:
    _check_weight_shape(x, weight)
    check(x, *weight[:4], bias, residual, activation)
    n, k = weight.shape
    m = x.shape[:-1].numel()
    blocks = weight.values.shape[0]
    stored = checks.short(weight.values.dtype)
    extension = backend.extension

    def choose() -> tuple[str, str]:
        return extension.choose_sparse_linear(  # type: ignore
            m, n, k, blocks, stored, checks.short(x.dtype)
        )

    return _frozen.explain("sparse_linear", x, device, choose if extension else None)


# --- public function -----------------------------------------------------------------------


def sparse_linear(
    x: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ W.T + bias) + residual`` with W in 1x4 blocks; dropped blocks cost nothing.

    With int8 values the rows of x are quantised at run time as in `quantized_linear` (a row with
    NaN or inf gives a row of NaN); with float32 values the product is held in float32.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides.
        weight: `sparsify_weight` of a ``[N, K]`` matrix; it has no gradient.
        bias: ``[N]`` in x's dtype, or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.

    Returns:
        ``[.., N]`` in x's dtype. Gradients for x, bias and residual are those of the linear layer
        with the dequantised weight (straight through the rounding of x). Under `torch.autocast`
        x, bias and residual are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, shapes or devices that do not fit, or a weight
            that requires a gradient.
        TypeError: a dtype that is not served, or dtypes that differ.
        RuntimeError: storage whose contents are broken (`SparseWeight.validate` says where).
    """
    values, index, panel_ptr, scale, (_, k) = weight
    if x.shape[-1:] != (k,):
        checks.tensors(x=x)
        _check_weight_shape(x, weight)
    return _op.apply(x, values, index, panel_ptr, scale, bias, residual, activation)
