"""Triton kernel of `low_rank_linear`: y = act(x base^T + scale (x v^T) u^T + bias) + residual.

Both products in one launch. A program makes t = scale x v^T of its rows, [BLOCK_M, rank], on chip,
and multiplies it by u tile of columns by tile of columns: t is never read from memory, and is
written only where the backward pass is to keep it. Sums run in float32 in a fixed order.

The backward pass is the same kernel with the factors swapped: gx = scale (gz u) v + gz base, whose
inner product gz u is what the gradient of v needs. The other gradients are plain products.

What rank fits on chip, and how columns are split among programs: model.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.activation import NONE, activate, ungated_code
from bigops.kernels.common.epilogue import finish
from bigops.kernels.common.launch import (
    check_alike,
    contiguous,
    dot_precision,
    is_aligned,
    is_wide,
    launch_options,
    launch_product,
    on_device,
    product_is_aligned,
    strides,
)
from bigops.kernels.common.product import product
from bigops.kernels.common.tile_walk import banded_tile, step_masks, wide_strides
from bigops.kernels.common.tiles import TileConfig, device_arch, pointwise_config
from bigops.kernels.fused_linear import preact_gradient
from bigops.kernels.low_rank_linear.model import COMPOSED, FUSED, fits, padded_rank, span_of


class Parts(NamedTuple):
    """What `forward` gives."""

    y: Tensor
    inner: Tensor | None
    preact: Tensor | None
    form: str


@triton.jit
def low_rank_product(
    x,  # [M, K]
    v,  # [K, R]
    u,  # [R, N]
    base,  # [K, N] or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N] out, rows contiguous
    inner,  # [M, R] out, rows contiguous: t; or None
    preact,  # [M, N] out, rows contiguous, or None
    M,
    N,
    K,
    R,
    span,  # column tiles of a program
    scale,
    stride_xm,
    stride_xk,
    stride_vk,
    stride_vr,
    stride_ur,
    stride_un,
    stride_bk,
    stride_bn,
    stride_rm,
    stride_rn,
    RANK: tl.constexpr,  # R rounded up to a power of two, at least 16
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y = act(x base + scale (x v) u + bias) + residual, `span` tiles of BLOCK_M rows."""
    stride_ym, stride_xm, stride_xk = wide_strides((N, stride_xm, stride_xk), WIDE)
    stride_vk, stride_vr, stride_ur, stride_un = wide_strides(
        (stride_vk, stride_vr, stride_ur, stride_un), WIDE
    )
    stride_bk, stride_bn, stride_rm, stride_rn = wide_strides(
        (stride_bk, stride_bn, stride_rm, stride_rn), WIDE
    )

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, own = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(tiles_n, span), GROUP_M)

    rm = tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    rr = tl.arange(0, RANK)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    in_m = tile_m * BLOCK_M + rm < M
    in_r = rr < R

    x_first = x + row0 * stride_xm + (rm[:, None] * stride_xm + rk[None, :] * stride_xk)
    x_tile = x_first
    v_tile = v + (rk[:, None] * stride_vk + rr[None, :] * stride_vr)
    t = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_mask, v_mask = step_masks(in_m, in_r, rk, K, k0, EVEN_K)
        x_block = tl.load(x_tile, mask=x_mask, other=0.0)
        v_block = tl.load(v_tile, mask=v_mask, other=0.0)
        t = tl.dot(x_block, v_block, t, input_precision=PRECISION)
        x_tile += BLOCK_K * stride_xk
        v_tile += BLOCK_K * stride_vk
    low = (t * scale).to(x.dtype.element_ty)
    if inner is not None:  # noqa: SIM102  (one is known when compiled, the other is not)
        if own == 0:
            t_tile = inner + row0 * R + (rm[:, None] * R + rr[None, :])
            tl.store(t_tile, low, mask=in_m[:, None] & in_r[None, :])

    first_n = own * span
    for step in range(0, tl.minimum(span, tiles_n - first_n)):
        tile_n = first_n + step
        col0 = tile_n.to(tl.int64) * BLOCK_N
        in_n = tile_n * BLOCK_N + rn < N
        u_tile = u + col0 * stride_un + (rr[:, None] * stride_ur + rn[None, :] * stride_un)
        u_block = tl.load(u_tile, mask=in_r[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(low, u_block, input_precision=PRECISION)
        if base is not None:
            x_tile = x_first
            b_tile = base + col0 * stride_bn + (rk[:, None] * stride_bk + rn[None, :] * stride_bn)
            for k0 in range(0, K, BLOCK_K):
                x_mask, b_mask = step_masks(in_m, in_n, rk, K, k0, EVEN_K)
                x_block = tl.load(x_tile, mask=x_mask, other=0.0)
                b_block = tl.load(b_tile, mask=b_mask, other=0.0)
                acc = tl.dot(x_block, b_block, acc, input_precision=PRECISION)
                x_tile += BLOCK_K * stride_xk
                b_tile += BLOCK_K * stride_bk
        finish(
            acc,
            acc,
            bias,
            residual,
            y,
            preact,
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


@triton.jit
def activate_rows(
    z,  # [M, N], rows contiguous
    residual,  # [M, N] or None
    y,  # [M, N] out, rows contiguous
    M,
    N,
    stride_rm,
    stride_rn,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = act(z) + residual; for a base whose factors do not fit on chip."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    out = activate(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), ACT)
    if residual is not None:
        r_tile = residual + (rows[:, None] * stride_rm + cols[None, :] * stride_rn)
        out += tl.load(r_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    v: Tensor,  # [K, R]
    u: Tensor,  # [R, N]
    base: Tensor | None,  # [K, N]
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    scale: float,
    with_inner: bool,
    with_preact: bool,
    config: TileConfig | None,
) -> Parts:
    """(y, t, z, "fused") by one launch, or as `_composed` where the rank does not fit."""
    (m, k), (rank, n) = x.shape, u.shape
    if config is None and m and n:
        aligned = product_is_aligned(n, x, base, residual)
        even = is_aligned(v) and is_aligned(u)  # a rank of 8 is not: small ranks need not be
        config = fits(device_arch(x.device), x.dtype, m, rank, base is not None, aligned, even)
        if config is None:
            return _composed(x, v, u, base, bias, residual, act, scale, with_inner, with_preact)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    inner = torch.empty((m, rank), dtype=x.dtype, device=x.device) if with_inner else None
    preact = torch.empty((m, n), dtype=x.dtype, device=x.device) if with_preact else None
    if m == 0 or n == 0:
        return Parts(y, inner, preact, FUSED)
    assert config is not None
    stride_b, stride_r = strides(base), strides(residual)
    width = padded_rank(rank)
    span = span_of(m, n, config)
    tiles_n = triton.cdiv(n, config.block_n)
    launch_product(
        low_rank_product,
        triton.cdiv(m, config.block_m) * triton.cdiv(tiles_n, span),
        config,
        x,
        v,
        u,
        base,
        bias,
        residual,
        y,
        inner,
        preact,
        m,
        n,
        k,
        rank,
        span,
        float(scale),
        *x.stride(),
        *v.stride(),
        *u.stride(),
        *stride_b,
        *stride_r,
        RANK=width,
        ACT=act,
        PRECISION=dot_precision(x.dtype),
        EVEN_K=k % config.block_k == 0,
        WIDE=is_wide(
            config.block_m * max(x.stride(0), stride_r[0], n, rank),
            config.block_n * max(u.stride(1), stride_b[1], stride_r[1]),
            config.block_k * max(x.stride(1), v.stride(0), stride_b[0]),
            width * max(v.stride(1), u.stride(0)),
        ),
    )
    return Parts(y, inner, preact, FUSED)


def _composed(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    scale: float,
    with_inner: bool,
    with_preact: bool,
) -> Parts:
    """(y, t, z, "composed") by dense launches, t and with a base the low-rank product in memory."""
    inner = product(x, v)[0]
    if scale != 1.0:
        inner.mul_(scale)
    kept = inner if with_inner else None
    if base is None:
        y, z = product(inner, u, bias=bias, residual=residual, act=act, with_preact=with_preact)
        return Parts(y, kept, z, COMPOSED)
    if act == NONE.value:
        low = product(inner, u, residual=residual)[0]
        y = product(x, base, bias=bias, residual=low)[0]
        return Parts(y, kept, None, COMPOSED)
    z = product(x, base, bias=bias, residual=product(inner, u)[0])[0]
    y = torch.empty_like(z)
    (m, n), tile = z.shape, pointwise_config(device_arch(z.device))
    with on_device(z.device):
        activate_rows[(triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n))](
            z,
            residual,
            y,
            m,
            n,
            *strides(residual),
            ACT=act,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **launch_options(tile.num_warps),
        )
    return Parts(y, kept, z if with_preact else None, COMPOSED)


def forward(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    activation: int = 0,
    scale: float = 1.0,
    with_parts: bool = False,
    config: TileConfig | None = None,
) -> Parts:
    """act(x base^T + scale (x v^T) u^T + bias) + residual, and the parts that gradients need.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, here and below.
        u: [N, r].
        v: [r, K].
        bias: [N].
        residual: [M, N].
        base: [N, K].
        activation: code, the position in `activation.NAMES`; no gated pair.
        scale: factor of the low-rank product.
        with_parts: also give t = scale x v^T and, where there is an activation, what it is given.
        config: the tile to use instead of the committed choice.

    Returns:
        (y [M, N], t [M, r] or None, z [M, N] or None), contiguous, in the dtype of x, and "fused"
        or, where t went through memory, "composed".

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: a gated or unknown activation, or a size past 2^31.
    """
    act = ungated_code(activation)
    check_alike(x=x, u=u, v=v, bias=bias, residual=residual, base=base)
    return _launch(
        x,
        v.t(),
        u.t(),
        None if base is None else base.t(),
        contiguous(bias),
        residual,
        act,
        scale,
        with_parts,
        with_parts and act != NONE.value,
        config,
    )


def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    inner: Tensor,
    preact: Tensor | None,
    activation: int,
    scale: float,
    need_x: bool,
    need_u: bool,
    need_v: bool,
    need_bias: bool,
    need_base: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str]:
    """Gradients of `forward` for x, u, v, bias and base (that of the residual is ``grad``).

    Args:
        grad: dL/dy, [M, N].
        x, u, v, base, activation, scale: as of `forward`.
        inner, preact: t and z as `forward` gave them; z may be None where there is no activation.
        need_x, need_u, need_v, need_bias, need_base: which gradients to compute; the others come
            back as [0].
        config: the tile of the product for x, instead of the committed choice.

    Returns:
        (gx [M, K], gu [N, r], gv [r, K], gb [N], gbase [N, K]), contiguous, in the dtype of x, and
        how gx was made: "fused", "composed", or "" where it is not needed.

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: a gated or unknown activation, a missing ``preact``, or a size past 2^31.
    """
    act = ungated_code(activation)
    check_alike(x=x, grad=grad, u=u, v=v, base=base, inner=inner, preact=preact)
    plain = act == NONE.value
    if preact is None and not plain:
        raise ValueError(f"preact: expected a tensor for activation {activation}; got None")
    copy = not plain or 1 not in grad.stride()  # as fused_linear.backward
    products = need_x or need_u or need_v or need_base
    gz, gb = preact_gradient(
        grad, None if plain else preact, activation, products and copy, need_bias
    )
    if gz is None:
        gz = grad
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    gx = gu = gv = gbase = nothing
    form = ""
    if need_x:
        gx, gt, _, form = _launch(
            gz, u, v, base, None, None, NONE.value, scale, need_v, False, config
        )
    elif need_v:
        gt = product(gz, u)[0]
        if scale != 1.0:
            gt.mul_(scale)
    if need_v:
        assert gt is not None
        gv = product(gt.t(), x)[0]
    if need_u:
        gu = product(gz.t(), inner)[0]
    if need_base:
        gbase = product(gz.t(), x)[0]
    return gx, gu, gv, gb if gb is not None else nothing, gbase, form
