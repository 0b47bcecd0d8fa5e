"""The strided GEMM of the linear ops: c = act(a b + bias) + residual, in Triton.

An operand is transposed by its strides and never copied. Sums run in float32 in a fixed order: the
result is bitwise equal from run to run for one config.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.activation import activate


@triton.jit
def _finish_tile(
    acc,  # float32 [BLOCK_M, columns]
    up,  # likewise, or acc again where not GATED
    bias,
    residual,
    c,
    preact,
    M,
    N,
    stride_rm,
    stride_rn,
    stride_cm,  # row length of c
    tile_m,
    column,  # of the tile's first column
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """The epilogue of `gemm` on one tile or on one half of its columns."""
    rm = tl.arange(0, acc.shape[0])
    rn = tl.arange(0, acc.shape[1])
    row0 = tile_m.to(tl.int64) * acc.shape[0]
    col0 = column.to(tl.int64)
    in_n = column + rn < N
    mask = (tile_m * acc.shape[0] + rm < M)[:, None] & in_n[None, :]
    if bias is not None:
        acc += tl.load(bias + col0 + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + N + col0 + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if preact is not None:
        width = stride_cm * 2 if GATED else stride_cm  # row length of preact
        z_tile = preact + (row0 * width + col0) + (rm[:, None] * width + rn[None, :])
        tl.store(z_tile, acc.to(preact.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(z_tile + N, up.to(preact.dtype.element_ty), mask=mask)
    acc = activate(acc, ACT)
    if GATED:
        acc = acc * up
    if residual is not None:
        r_tile = residual + (row0 * stride_rm + col0 * stride_rn)
        r_tile += rm[:, None] * stride_rm + rn[None, :] * stride_rn
        acc += tl.load(r_tile, mask=mask, other=0.0).to(tl.float32)
    c_tile = c + (row0 * stride_cm + col0) + (rm[:, None] * stride_cm + rn[None, :])
    tl.store(c_tile, acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of a tile."""
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _finish(
    acc, up, bias, residual, c, preact, M, N, stride_rm, stride_rn, stride_cm, tile_m, column,
    ACT: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_finish_tile` on PARTS groups of columns in turn; one for a wide tile would spill."""
    # fmt: off
    if PARTS == 1:
        _finish_tile(acc, up, bias, residual, c, preact, M, N, stride_rm, stride_rn,
                     stride_cm, tile_m, column, ACT, GATED)
    else:
        left, right = _halves(acc)
        up_left, up_right = left, right
        if GATED:
            up_left, up_right = _halves(up)
        _finish(left, up_left, bias, residual, c, preact, M, N, stride_rm, stride_rn,
                stride_cm, tile_m, column, ACT, GATED, PARTS // 2)
        _finish(right, up_right, bias, residual, c, preact, M, N, stride_rm, stride_rn,
                stride_cm, tile_m, column + acc.shape[1] // 2, ACT, GATED, PARTS // 2)
    # fmt: on


@triton.jit
def gemm(
    a,  # [M, K]
    b,  # [K, N], or [K, 2N] gated: gate columns, then up columns
    bias,  # [N] or [2N] or None
    residual,  # [M, N] or None
    c,  # [M, N] out, rows contiguous
    preact,  # [M, N] or [M, 2N] out, rows contiguous, or None
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_rm,
    stride_rn,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """c = act(a b + bias) + residual; each program makes one [BLOCK_M, BLOCK_N] tile of c."""
    # Bases are 64 bit; offsets inside a tile stay 32 bit unless a stride is enormous (WIDE).
    stride_cm = N
    if WIDE:
        stride_cm = tl.cast(N, tl.int64)
        stride_am = tl.cast(stride_am, tl.int64)
        stride_ak = tl.cast(stride_ak, tl.int64)
        stride_bk = tl.cast(stride_bk, tl.int64)
        stride_bn = tl.cast(stride_bn, tl.int64)
        stride_rm = tl.cast(stride_rm, tl.int64)
        stride_rn = tl.cast(stride_rn, tl.int64)

    # Bands of GROUP_M tile rows are walked column by column, so that neighbouring programs share
    # both a rows and b columns in the L2 cache.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = GROUP_M * tiles_n
    first_m = (pid // band) * GROUP_M
    band_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (pid % band) % band_rows
    tile_n = (pid % band) // band_rows

    rm = tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    col0 = tile_n.to(tl.int64) * BLOCK_N
    in_m = tile_m * BLOCK_M + rm < M
    in_n = tile_n * BLOCK_N + rn < N

    a_tile = a + row0 * stride_am + (rm[:, None] * stride_am + rk[None, :] * stride_ak)
    b_tile = b + col0 * stride_bn + (rk[:, None] * stride_bk + rn[None, :] * stride_bn)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        u_tile = b_tile + tl.cast(N, tl.int64) * stride_bn
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a_mask = in_m[:, None]
            b_mask = in_n[None, :]
        else:
            a_mask = in_m[:, None] & (rk[None, :] < K - k0)
            b_mask = in_n[None, :] & (rk[:, None] < K - k0)
        a_block = tl.load(a_tile, mask=a_mask, other=0.0)
        b_block = tl.load(b_tile, mask=b_mask, other=0.0)
        acc = tl.dot(a_block, b_block, acc, input_precision=PRECISION)
        if GATED:
            u_block = tl.load(u_tile, mask=b_mask, other=0.0)
            up = tl.dot(a_block, u_block, up, input_precision=PRECISION)
            u_tile += BLOCK_K * stride_bk
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk

    # fmt: off
    _finish(acc, up if GATED else acc, bias, residual, c, preact, M, N, stride_rm, stride_rn,
            stride_cm, tile_m, tile_n * BLOCK_N, ACT, GATED, PARTS)
    # fmt: on


def dot_precision(dtype: torch.dtype) -> str:
    """Name the precision of float32 products: "tf32" where torch's own may use it, else "ieee"."""
    if dtype == torch.float32 and torch.version.hip is None:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


def _is_aligned(t: Tensor) -> bool:
    # What triton's launcher looks at: with one unit stride and the rest so, words are wide.
    wide = all(step == 1 or step % 16 == 0 for step in t.stride())
    return wide and 1 in t.stride() and t.data_ptr() % 16 == 0
