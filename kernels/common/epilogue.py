"""What a program of a product does with its sums: bias, activation, gate, residual, store."""

import triton
import triton.language as tl

from bigops.kernels.common.activation import activate


@triton.jit
def finish_tile(
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
    """c = act(acc + bias) + residual on a tile or on a part of its columns; preact = acc + bias."""
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
def finish(
    acc,
    up,
    bias,
    residual,
    c,
    preact,
    M,
    N,
    stride_rm,
    stride_rn,
    stride_cm,
    tile_m,
    column,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`finish_tile` on PARTS groups of columns in turn; one for a wide tile would spill."""
    if PARTS == 1:
        finish_tile(
            acc,
            up,
            bias,
            residual,
            c,
            preact,
            M,
            N,
            stride_rm,
            stride_rn,
            stride_cm,
            tile_m,
            column,
            ACT,
            GATED,
        )
    else:
        left, right = _halves(acc)
        up_left, up_right = left, right
        if GATED:
            up_left, up_right = _halves(up)
        finish(
            left,
            up_left,
            bias,
            residual,
            c,
            preact,
            M,
            N,
            stride_rm,
            stride_rn,
            stride_cm,
            tile_m,
            column,
            ACT,
            GATED,
            PARTS // 2,
        )
        finish(
            right,
            up_right,
            bias,
            residual,
            c,
            preact,
            M,
            N,
            stride_rm,
            stride_rn,
            stride_cm,
            tile_m,
            column + acc.shape[1] // 2,
            ACT,
            GATED,
            PARTS // 2,
        )
