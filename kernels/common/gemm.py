"""The strided GEMM of the linear ops: c = act(a b + bias) + residual, in Triton.

An operand is transposed by its strides and never copied. Sums run in float32 in a fixed order: the
result is bitwise equal from run to run for one config.
"""

import triton
import triton.language as tl

from bigops.kernels.common.epilogue import finish
from bigops.kernels.common.tile_walk import banded_tile, step_masks, wide_strides


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
    stride_cm, stride_am, stride_ak, stride_bk, stride_bn, stride_rm, stride_rn = wide_strides(
        (N, stride_am, stride_ak, stride_bk, stride_bn, stride_rm, stride_rn), WIDE
    )

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(N, BLOCK_N), GROUP_M)

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
        a_mask, b_mask = step_masks(in_m, in_n, rk, K, k0, EVEN_K)
        a_block = tl.load(a_tile, mask=a_mask, other=0.0)
        b_block = tl.load(b_tile, mask=b_mask, other=0.0)
        acc = tl.dot(a_block, b_block, acc, input_precision=PRECISION)
        if GATED:
            u_block = tl.load(u_tile, mask=b_mask, other=0.0)
            up = tl.dot(a_block, u_block, up, input_precision=PRECISION)
            u_tile += BLOCK_K * stride_bk
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk

    finish(
        acc,
        up if GATED else acc,
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
        tile_n * BLOCK_N,
        ACT,
        GATED,
        PARTS,
    )
