"""Triton kernel of the backward of `quantized_linear`: gx = gz W, W int8 or int4 as it is stored.

The sum runs over the rows of W, whose scales therefore cannot wait for its end as they do in the
forward: each number is scaled on its way to the matrix unit (common/scaled_dot.py). No dequantised
weight is ever stored. Sums are float32, in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.launch import (
    check_operands,
    contiguous,
    dot_precision,
    is_wide,
    launch_product,
    product_is_aligned,
)
from bigops.kernels.common.scaled_dot import scaled_dot
from bigops.kernels.common.tile_walk import banded_tile, wide_strides
from bigops.kernels.common.tiles import TileConfig, device_arch
from bigops.kernels.quantized_linear.forward import LINE, _numbers
from bigops.kernels.quantized_linear.tiles import choose_config


@triton.jit
def quantized_gradient(
    gz,  # [M, N]
    values,  # [tiles, LINES, 16, 4]: int8, or uint8 with two numbers each
    scale,  # float32 [groups, N16]
    zero_point,  # int8 [groups, N16] or None
    gx,  # [M, K] out, rows contiguous
    M,
    N,
    K,
    LINES,  # of a tile of values
    N16,
    stride_gm,
    stride_gn,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # a multiple of BLOCK_N, or 0 for one scale a row
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,  # BLOCK_K divides N
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of gx
    BLOCK_K: tl.constexpr,  # rows of W in a step
    GROUP_M: tl.constexpr,
):
    """gx = gz (scale * (q - zero_point)); each program makes one [BLOCK_M, BLOCK_N] tile of gx."""
    STEP: tl.constexpr = BLOCK_N * 2 * BITS  # bytes of a tile of the storage in one block
    stride_xm, lines = wide_strides((K, LINES), WIDE)
    run = lines * LINE  # bytes of a tile of the storage
    stride_gm, stride_gn = wide_strides((stride_gm, stride_gn), WIDE)

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_k = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(K, BLOCK_N), GROUP_M)

    rm = tl.arange(0, BLOCK_M)
    rc = tl.arange(0, BLOCK_N)
    rn = tl.arange(0, BLOCK_K)
    rt = tl.arange(0, BLOCK_K // 16)
    rb = tl.arange(0, STEP)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    col0 = tile_k.to(tl.int64) * BLOCK_N
    in_m = tile_m * BLOCK_M + rm < M
    in_line = (rb // LINE) + tile_k * (BLOCK_N * BITS // 32) < LINES

    g_tile = gz + row0 * stride_gm + (rm[:, None] * stride_gm + rn[None, :] * stride_gn)
    w_tile = values + tile_k.to(tl.int64) * STEP + (rt[:, None] * run + rb[None, :])
    at = tl.cast(0, tl.int64)
    if GROUP > 0:
        at = (col0 // GROUP) * N16
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for n0 in range(0, N, BLOCK_K):
        g_mask = in_m[:, None]
        w_mask = in_line[None, :]
        in_n = n0 + rn < N16
        if not EVEN_N:
            g_mask = g_mask & (n0 + rn < N)[None, :]
            w_mask = w_mask & (n0 // 16 + rt < N16 // 16)[:, None]
        g = tl.load(g_tile, mask=g_mask, other=0.0)
        w = _numbers(tl.load(w_tile, mask=w_mask, other=0), BITS, BLOCK_K, BLOCK_N)
        by = tl.load(scale + at + n0 + rn, mask=in_n, other=0.0)
        if zero_point is not None:
            zero = tl.load(zero_point + at + n0 + rn, mask=in_n, other=0)
            w = w.to(tl.int16) - zero.to(tl.int16)[:, None]
        acc = scaled_dot(acc, g, w, by, PRECISION)
        g_tile += BLOCK_K * stride_gn
        w_tile += tl.cast(BLOCK_K // 16, tl.int64) * run

    x_tile = gx + row0 * stride_xm + col0 + (rm[:, None] * stride_xm + rc[None, :])
    in_k = tile_k * BLOCK_N + rc < K
    tl.store(x_tile, acc.to(gx.dtype.element_ty), mask=in_m[:, None] & in_k[None, :])


def kind_of(bits: int) -> str:
    """The kind of product, as the config files name it: "w8_gradient" or "w4_gradient"."""
    return f"w{bits}_gradient"


def within(config: TileConfig, group: int) -> TileConfig:
    """``config`` with tiles whose columns share the scale of one group."""
    return config._replace(block_n=min(config.block_n, group)) if group else config


def gradient(
    gz: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    k: int,
    bits: int,
    group: int,
    config: TileConfig | None = None,
) -> Tensor:
    """gz W, the gradient of x; the storage as in `bigops.ops.quantized_linear`.

    Args:
        gz: [M, N], float32, bfloat16 or float16; any strides.
        values: [ceil(N / 16), ceil(K / 4), 16, 4] int8, or with 8 columns a line uint8 in 4 bits.
        scale: [groups, N16] float32, N16 = N rounded up to 16.
        zero_point: [groups, N16] int8, or None.
        k: K.
        bits: 8 or 4.
        group: columns that share a scale: 32, 64, 128, or 0 for all.
        config: tiles to use instead of the committed choice: rows and columns of gx, rows of W.

    Returns:
        [M, K], contiguous, in the dtype of gz.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: differing devices, or a size past 2^31.
    """
    check_operands(gz, values=values, scale=scale, zero_point=zero_point)
    m, n = gz.shape
    gx = torch.empty((m, k), dtype=gz.dtype, device=gz.device)
    if m == 0 or k == 0:
        return gx
    if config is None:
        kind = kind_of(bits)
        config = choose_config(device_arch(gz.device), kind, gz.dtype, m, product_is_aligned(k, gz))
    config = within(config, group)
    lines = values.shape[1]
    launch_product(
        quantized_gradient,
        triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),
        config,
        gz,
        values.contiguous(),
        scale.contiguous(),
        contiguous(zero_point),
        gx,
        m,
        n,
        k,
        lines,
        scale.shape[1],
        *gz.stride(),
        BITS=bits,
        GROUP=group,
        PRECISION=dot_precision(gz.dtype),
        EVEN_N=n % config.block_k == 0,
        WIDE=is_wide(
            config.block_m * max(gz.stride(0), k),
            config.block_k * max(lines * LINE.value // 16, gz.stride(1)),
        ),
    )
    return gx
