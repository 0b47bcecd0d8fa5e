"""Triton kernel of the backward of `fp8_linear`: gx = gz W, W as e4m3fn codes as it is stored.

The sum runs over the rows of W. A scale for all of W comes after it, that of a block after the
product of the block. Scales of rows cannot wait: each number is scaled on its way to the matrix
unit (common/scaled_dot.py). No dequantised weight is ever stored. Sums are float32, in a fixed
order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.launch import (
    check_operands,
    dot_precision,
    is_wide,
    launch_product,
    product_is_aligned,
)
from bigops.kernels.common.scaled_dot import scaled_dot
from bigops.kernels.common.tile_walk import banded_tile, wide_strides
from bigops.kernels.common.tiles import TileConfig, device_arch
from bigops.kernels.fp8_linear.forward import BLOCKS, ROW, SCALES, SPAN, _codes, _widen
from bigops.kernels.fp8_linear.tiles import BLOCK, choose_config, units_of

KIND = "f8_gradient"


@triton.jit
def fp8_gradient(
    gz,  # [M, N]
    w,  # codes [N, stride_w], 0 beyond K
    scale,  # float32 [1], [N] or [ceil(N / 128), GROUPS]
    gx,  # [M, K] out, rows contiguous
    M,
    N,
    K,
    GROUPS,  # ceil(K / 128)
    stride_gm,
    stride_gn,
    stride_w,
    SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,  # BLOCK_K divides N
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of gx, within a block of columns of W
    BLOCK_K: tl.constexpr,  # rows of W in a step, within a block of them
    GROUP_M: tl.constexpr,
):
    """gx = gz (scale * codes); each program makes one [BLOCK_M, BLOCK_N] tile of gx.

    Codes come as float8e4nv where a unit knows e4m3fn, else as uint8.
    """
    stride_xm, stride_gm, stride_gn, stride_w = wide_strides(
        (K, stride_gm, stride_gn, stride_w), WIDE
    )

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_k = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(K, BLOCK_N), GROUP_M)

    rm = tl.arange(0, BLOCK_M)
    rc = tl.arange(0, BLOCK_N)
    rn = tl.arange(0, BLOCK_K)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    col0 = tile_k.to(tl.int64) * BLOCK_N
    in_m = tile_m * BLOCK_M + rm < M
    in_k = tile_k * BLOCK_N + rc < K

    g_tile = gz + row0 * stride_gm + (rm[:, None] * stride_gm + rn[None, :] * stride_gn)
    w_tile = w + col0 + (rn[:, None] * stride_w + rc[None, :])
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for n0 in range(0, N, BLOCK_K):
        g_mask = in_m[:, None]
        w_mask = in_k[None, :]
        if not EVEN_N:
            g_mask = g_mask & (n0 + rn < N)[None, :]
            w_mask = w_mask & (n0 + rn < N)[:, None]
        g = tl.load(g_tile, mask=g_mask, other=0.0)
        q = tl.load(w_tile, mask=w_mask, other=0.0)
        if q.dtype == tl.uint8:
            q = _widen(q)
        if SCALES == ROW:
            by = tl.load(scale + n0 + rn, mask=n0 + rn < N, other=0.0)
            acc = scaled_dot(acc, g, q, by, PRECISION)
        elif SCALES == BLOCKS:
            at = tl.cast(n0 // SPAN, tl.int64) * GROUPS + col0 // SPAN
            part = tl.dot(g, q.to(gz.dtype.element_ty), input_precision=PRECISION)
            acc += part * tl.load(scale + at)
        else:
            acc = tl.dot(g, q.to(gz.dtype.element_ty), acc, input_precision=PRECISION)
        g_tile += BLOCK_K * stride_gn
        w_tile += tl.cast(BLOCK_K, tl.int64) * stride_w

    if SCALES != ROW and SCALES != BLOCKS:
        acc *= tl.load(scale)
    x_tile = gx + row0 * stride_xm + col0 + (rm[:, None] * stride_xm + rc[None, :])
    tl.store(x_tile, acc.to(gx.dtype.element_ty), mask=in_m[:, None] & in_k[None, :])


def gradient(
    gz: Tensor,
    values: Tensor,
    scale: Tensor,
    k: int,
    scales: str,
    config: TileConfig | None = None,
    units: str | None = None,
) -> Tensor:
    """gz W, the gradient of x; the storage as in `bigops.ops.fp8_linear`.

    Args:
        gz: [M, N], float32, bfloat16 or float16; any strides.
        values: [N, K rounded up to 16] float8_e4m3fn, 0 beyond K.
        scale: float32 [1, 1], [N, 1] or [ceil(N / 128), ceil(K / 128)].
        k: K.
        scales: "tensor", "row" or "block".
        config: tiles to use instead of the committed choice: rows and columns of gx, rows of W;
            the last two at most 128.
        units: what knows e4m3, of `fp8_tiles.UNITS`, instead of what the device has.

    Returns:
        [M, K], contiguous, in the dtype of gz.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: differing devices, or a size past 2^31.
    """
    check_operands(gz, values=values, scale=scale)
    m, n = gz.shape
    gx = torch.empty((m, k), dtype=gz.dtype, device=gz.device)
    if m == 0 or k == 0:
        return gx
    arch = device_arch(gz.device)
    units = units_of(arch) if units is None else units
    if config is None:
        config = choose_config(arch, KIND, gz.dtype, m, product_is_aligned(k, gz))
    values = values.contiguous()
    launch_product(
        fp8_gradient,
        triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),
        config,
        gz,
        _codes(values, units),
        scale.contiguous(),
        gx,
        m,
        n,
        k,
        triton.cdiv(k, BLOCK),
        *gz.stride(),
        values.shape[1],
        SCALES=SCALES[scales],
        PRECISION=dot_precision(gz.dtype),
        EVEN_N=n % config.block_k == 0,
        WIDE=is_wide(
            config.block_m * max(gz.stride(0), k),
            config.block_k * max(values.shape[1], gz.stride(1)),
        ),
    )
    return gx
