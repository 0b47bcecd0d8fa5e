"""Triton kernels of `quantized_linear`: y = act(x W^T + bias) + residual, W int8 or int4.

The kernels read the storage of `bigops.ops.quantized_linear.QuantizedWeight` as it is kept and
saved; nothing is packed anew for the GPU. Its tiles suit both: 16 rows of W are one run of memory,
[K / 4, 16, 4] bytes in int8 and [K / 8, 16, 4] in int4, so that a program loads whole cache lines
in wide words and permutes them on chip. In int4 the bits of a column within its line, c2 c1 c0,
are bit 0 of the byte, the nibble, and bit 1 of the byte.

Whole numbers enter the products, scales come after: q - zero_point is exact in every dtype of x
(at most 255 in magnitude), so a bfloat16 product rounds nothing that float32 would not. Groups are
summed by themselves and added up in float32 by their scales. Where x is quantised, a first kernel
gives each row u8 numbers, less 128 so that they are signed as the matrix units want them, and the
sums are int32, exact for K below `MAX_K`. Sums run in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common import tuned
from bigops.kernels.common.activation import ungated_code
from bigops.kernels.common.epilogue import finish
from bigops.kernels.common.launch import (
    check_operands,
    contiguous,
    dot_precision,
    is_wide,
    launch_product,
    product_is_aligned,
    strides,
)
from bigops.kernels.common.tile_walk import banded_tile, wide_strides
from bigops.kernels.common.tiles import DTYPES, TileConfig, arch_of, device_arch
from bigops.kernels.quantized_linear.rows import quantize_activations
from bigops.kernels.quantized_linear.tiles import choose_config, table_for

LINE = tl.constexpr(64)  # bytes of a line of a tile
MAX_K = 2**17  # 128 * 128 * K stays below 2^31
_EXACT_K = 33025  # 255 * 255 * K stays below 2^31


@triton.jit
def _numbers(block, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] int8 numbers q of [BLOCK_N / 16, lines * 64] bytes of the storage."""
    if BITS == 8:
        w = tl.reshape(block, (BLOCK_N // 16, BLOCK_K // 4, 16, 4))
        w = tl.permute(w, (0, 2, 1, 3))
    else:
        w = tl.reshape(block, (BLOCK_N // 16, BLOCK_K // 8, 16, 2, 2))  # tile, line, row, c0, c2
        w = tl.join(w & 15, w >> 4).to(tl.int8) - 8  # and c1
        w = tl.permute(w, (0, 2, 1, 4, 5, 3))
    return tl.reshape(w, (BLOCK_N, BLOCK_K))


@triton.jit
def quantized_gemm(
    x,  # [M, K], or int8 [M, stride_xm] of `act_quant`
    values,  # [tiles, LINES, 16, 4]: int8, or uint8 with two numbers each
    scale,  # float32 [groups, N16]
    zero_point,  # int8 [groups, N16] or None
    row_sum,  # int32 [N16] (8 bits), float32 [N16] (4 bits); None with a floating x
    x_scale,  # float32 [M], x_zero and x_sum int32 [M]; None with a floating x
    x_zero,
    x_sum,
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N] out, rows contiguous
    M,
    N,
    K,
    LINES,  # of a tile of values
    N16,
    stride_xm,
    stride_xk,
    stride_rm,
    stride_rn,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # a multiple of BLOCK_K, or 0 for one scale a row
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXACT: tl.constexpr,  # int32 holds every sum of 255 * 255
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y = act(x W^T + bias) + residual; each program makes one [BLOCK_M, BLOCK_N] tile of y."""
    WHOLE: tl.constexpr = x.dtype.element_ty == tl.int8
    STEP: tl.constexpr = BLOCK_K * 2 * BITS  # bytes of a tile of the storage in one block
    stride_ym, lines = wide_strides((N, LINES), WIDE)
    run = lines * LINE  # bytes of a tile of the storage
    stride_xm, stride_xk, stride_rm, stride_rn = wide_strides(
        (stride_xm, stride_xk, stride_rm, stride_rn), WIDE
    )

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(N, BLOCK_N), GROUP_M)

    rm = tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    rt = tl.arange(0, BLOCK_N // 16)
    rb = tl.arange(0, STEP)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    col0 = tile_n.to(tl.int64) * BLOCK_N
    in_m = tile_m * BLOCK_M + rm < M
    in_n = tile_n * BLOCK_N + rn < N16
    in_t = tile_n * (BLOCK_N // 16) + rt < N16 // 16

    x_tile = x + row0 * stride_xm + (rm[:, None] * stride_xm + rk[None, :] * stride_xk)
    w_tile = values + (col0 // 16) * LINES * LINE + (rt[:, None] * run + rb[None, :])
    s_tile = scale + col0 + rn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if WHOLE and GROUP == 0 else tl.float32)
    # With 8 bits the zero points of W and x meet after the sums: q - zero_point has 9 bits.
    LATE: tl.constexpr = WHOLE and BITS == 8
    if zero_point is not None:
        z_tile = zero_point + col0 + rn
        if GROUP == 0:
            zero = tl.load(z_tile, mask=in_n, other=0)
    for k0 in range(0, K, BLOCK_K):
        w_mask = in_t[:, None]
        x_mask = in_m[:, None]
        if not EVEN_K:
            w_mask = w_mask & ((rb // LINE)[None, :] < LINES - k0 * BITS // 32)
            if not WHOLE:
                x_mask = x_mask & (rk[None, :] < K - k0)
        x_block = tl.load(x_tile, mask=x_mask, other=0)
        w = _numbers(tl.load(w_tile, mask=w_mask, other=0), BITS, BLOCK_N, BLOCK_K)
        if GROUP > 0:
            at = tl.cast(k0 // GROUP, tl.int64) * N16
            if zero_point is not None:
                zero = tl.load(z_tile + at, mask=in_n, other=0)
        if zero_point is not None and not LATE:
            w = w - zero[:, None] if BITS == 4 else w.to(tl.int16) - zero.to(tl.int16)[:, None]
        if not WHOLE:
            w = w.to(x.dtype.element_ty)
        if GROUP == 0:
            if WHOLE:
                acc = tl.dot(x_block, tl.trans(w), acc)
            else:
                acc = tl.dot(x_block, tl.trans(w), acc, input_precision=PRECISION)
        else:
            by = tl.load(s_tile + at, mask=in_n, other=0.0)
            if WHOLE:
                part = tl.dot(x_block, tl.trans(w)).to(tl.float32)
            else:
                part = tl.dot(x_block, tl.trans(w), input_precision=PRECISION)
            acc += part * by[None, :]
        x_tile += BLOCK_K * stride_xk
        w_tile += STEP

    if WHOLE:
        by_row = tl.load(x_scale + row0 + rm, mask=in_m, other=0.0)
        x_at = tl.load(x_zero + row0 + rm, mask=in_m, other=0)
        sums = tl.load(row_sum + col0 + rn, mask=in_n, other=0)
    if LATE:
        by = tl.load(s_tile, mask=in_n, other=0.0)
        if zero_point is not None:
            of_x = tl.load(x_sum + row0 + rm, mask=in_m, other=0)
        if not EXACT:
            acc = acc.to(tl.int64)
            x_at = x_at.to(tl.int64)
            if zero_point is not None:
                of_x = of_x.to(tl.int64)
        acc -= x_at[:, None] * sums[None, :]
        if zero_point is not None:
            acc -= (of_x - x_at * K)[:, None] * zero.to(tl.int32)[None, :]
        total = acc.to(tl.float32) * (by_row[:, None] * by[None, :])
    else:
        total = acc.to(tl.float32)
        if GROUP == 0:
            total *= tl.load(s_tile, mask=in_n, other=0.0)[None, :]
        if WHOLE:
            total = (total - x_at.to(tl.float32)[:, None] * sums[None, :]) * by_row[:, None]
    finish(
        total,
        total,
        bias,
        residual,
        y,
        None,
        M,
        N,
        stride_rm,
        stride_rn,
        stride_ym,
        tile_m,
        tile_n * BLOCK_N,
        ACT,
        False,
        PARTS,
    )


def kind_of(bits: int, activations: str) -> str:
    """The kind of product, as the config files name it: "w8a8", "w4a8", "w8" or "w4"."""
    return f"w{bits}" + ("" if activations == "none" else "a8")


def within(config: TileConfig, group: int) -> TileConfig:
    """``config`` with blocks along K that hold one group at most."""
    return config._replace(block_k=min(config.block_k, group)) if group else config


def forward(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    row_sum: Tensor | None,
    x_qparams: Tensor | None,
    n: int,
    bits: int,
    group: int,
    activations: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    config: TileConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(x W^T + bias) + residual; the storage as in `bigops.ops.quantized_linear`.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, here and below.
        values: [ceil(N / 16), ceil(K / 4), 16, 4] int8, or with 8 columns a line uint8 in 4 bits.
        scale: [groups, N16] float32, N16 = N rounded up to 16.
        zero_point: [groups, N16] int8, or None.
        row_sum: [N16] int32, float32 in 4 bits; None with activations "none".
        x_qparams: [2] float32 with activations "static", else None.
        n: N.
        bits: 8 or 4.
        group: columns that share a scale: 32, 64, 128, or 0 for all.
        activations: "none", "dynamic", "symmetric" or "static".
        bias: [N] in x's dtype.
        residual: [M, N] in x's dtype.
        activation: code, the position in `activation.NAMES`; no gated pair.
        config: tiles to use instead of the committed choice.
        dtype: of the result, None for that of x.

    Returns:
        [M, N], contiguous.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: a gated or unknown activation, differing devices, a size past 2^31, or a K of
            `MAX_K` or more with quantised activations.
    """
    act = ungated_code(activation)
    storage = {"values": values, "scale": scale, "zero_point": zero_point, "row_sum": row_sum}
    check_operands(x, **storage, x_qparams=x_qparams, bias=bias, residual=residual)
    m, k = x.shape
    whole = activations != "none"
    if whole and k >= MAX_K:
        raise ValueError(f"x: expected fewer than {MAX_K} columns to quantise; got {k}")
    y = torch.empty((m, n), dtype=dtype or x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    if config is None:
        kind = kind_of(bits, activations)
        aligned = product_is_aligned(n, None if whole else x, residual)
        config = choose_config(device_arch(x.device), kind, x.dtype, m, aligned)
    config = within(config, group)
    a, by, zero, sums = x, None, None, None
    if whole:
        a, by, zero, sums = quantize_activations(x, activations, x_qparams)
    stride_r, lines = strides(residual), values.shape[1]
    launch_product(
        quantized_gemm,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config,
        a,
        values.contiguous(),
        scale.contiguous(),
        contiguous(zero_point),
        contiguous(row_sum),
        by,
        zero,
        sums,
        contiguous(bias),
        residual,
        y,
        m,
        n,
        k,
        lines,
        scale.shape[1],
        *a.stride(),
        *stride_r,
        BITS=bits,
        GROUP=group,
        ACT=act,
        PRECISION=dot_precision(x.dtype),
        EVEN_K=k % config.block_k == 0,
        EXACT=k <= _EXACT_K,
        WIDE=is_wide(
            config.block_m * max(a.stride(0), stride_r[0], n),
            config.block_n * max(lines * LINE.value // 16, stride_r[1]),
            config.block_k * a.stride(1),
        ),
    )
    return y


def explain(
    target: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    bits: int,
    group: int,
    activations: str,
) -> tuple[dict[str, int | str], str]:
    """Say which config the product takes on ``target``, which need not be present.

    Contiguous tensors are assumed; others may take the tile for unaligned products.

    Args:
        target: "sm_90", "gfx942" and so on; or "cuda", the present GPU.
        dtype: of x.
        m, k: x is [m, k].
        n: output features.
        bits, group, activations: as for `forward`.

    Returns:
        (config fields and the file they come from, the reason).

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unknown target, or "cuda" where torch sees no GPU.
    """
    target = arch_of(target)
    kind = kind_of(bits, activations)
    aligned = n % 16 == 0 and (activations != "none" or k % 16 == 0)
    config = within(choose_config(target, kind, dtype, m, aligned), group)
    committed = f"quantized_linear/{table_for(target).device}.json"
    form, at = tuned.form_of(kind, aligned), tuned.bucket(m)
    file, where = tuned.cite("quantized_linear", target, form, DTYPES[dtype], at, committed)
    what = f"{'' if aligned else 'un'}aligned {kind} {DTYPES[dtype]}"
    return {**config.of_one_form(), "file": file}, f"{what} tile for {m} rows {where}"
