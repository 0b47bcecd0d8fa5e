"""Triton kernels of `fused_linear`: y = act(x W^T + bias) + residual, forward and backward.

One strided GEMM (common/gemm.py) serves all three products: x W^T with its epilogue, gz W and
gz^T x. The gradient of the pre-activation and the column sum for the bias come from one elementwise
kernel, with no atomics: the order of summation depends on the shape alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common import tuned
from bigops.kernels.common.activation import NONE, activate, derivative, split_code
from bigops.kernels.common.launch import check_alike, contiguous, launch_options, on_device
from bigops.kernels.common.product import product
from bigops.kernels.common.tiles import (
    DTYPES,
    FORMS,
    TileConfig,
    arch_of,
    choose_config,
    device_arch,
    pointwise_config,
    table_for,
)

_MAX_GRID_Y = 65535  # CUDA C++ Programming Guide, "Technical Specifications"


@triton.jit
def activation_backward(
    grad,  # [M, N]
    preact,  # [M, N], or [M, 2N] gated, or None where ACT is NONE
    gz,  # like preact, rows contiguous, out, or None
    partial,  # float32 [programs along M, N or 2N] out, or None
    M,
    N,
    stride_gm,
    stride_gn,
    stride_zm,
    stride_zn,
    rows_per_program,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """gz = grad * act'(preact), and its column sums over this program's rows."""
    chunk = tl.program_id(0)
    first = chunk * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = cols < N
    width = N * 2 if GATED else N
    if partial is not None:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if GATED:
            total_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row0 in range(first, last, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < last)[:, None] & in_n[None, :]
        g_tile = grad + rows[:, None] * stride_gm + cols[None, :] * stride_gn
        g = tl.load(g_tile, mask=mask, other=0.0).to(tl.float32)
        if preact is not None:
            z_tile = preact + rows[:, None] * stride_zm + cols[None, :] * stride_zn
            z = tl.load(z_tile, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                u_tile = z_tile + tl.cast(N, tl.int64) * stride_zn
                u = tl.load(u_tile, mask=mask, other=0.0).to(tl.float32)
                g_up = g * activate(z, ACT)
                g = g * u * derivative(z, ACT)
            else:
                g = g * derivative(z, ACT)
        if gz is not None:
            out = gz + rows[:, None] * width + cols[None, :]
            tl.store(out, g.to(gz.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(out + N, g_up.to(gz.dtype.element_ty), mask=mask)
        if partial is not None:
            total += g
            if GATED:
                total_up += g_up
    if partial is not None:
        out_row = partial + chunk.to(tl.int64) * width + cols
        tl.store(out_row, tl.sum(total, axis=0), mask=in_n)
        if GATED:
            tl.store(out_row + N, tl.sum(total_up, axis=0), mask=in_n)


@triton.jit
def sum_rows(
    partial,  # float32 [R, N]
    out,  # [N]
    R,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = partial summed over its rows, in a fixed order."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = cols < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row0 in range(0, R, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < R)[:, None] & in_n[None, :]
        total += tl.load(partial + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=in_n)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    with_preact: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(x W^T + bias) + residual, and the pre-activation if asked for.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, here and below.
        weight: [N, K]; for gated pairs [2N, K], gate rows first.
        bias: [N] or [2N].
        residual: [M, N].
        activation: code, the position in `activation.NAMES`.
        with_preact: also store z = x W^T + bias, [M, N] or [M, 2N].
        config: tiles to use instead of the committed choice.

    Returns:
        (y [M, N], z or None), contiguous, in the dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: unknown activation, or a size past 2^31.
    """
    act, gated = split_code(activation)
    check_alike(x=x, weight=weight, bias=bias, residual=residual)
    return product(
        x,
        weight.t(),
        bias=contiguous(bias),
        residual=residual,
        act=act,
        gated=gated,
        with_preact=with_preact,
        config=config,
    )


def preact_gradient(
    grad: Tensor,
    preact: Tensor | None,
    activation: int,
    need_gz: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """gz = grad * act'(preact) [M, N] or [M, 2N], and its column sum; None for what is not asked.

    Args: as for `backward`.
    """
    act, gated = split_code(activation)
    m, n = grad.shape
    width = 2 * n if gated else n
    gz = torch.empty((m, width), dtype=grad.dtype, device=grad.device) if need_gz else None
    gb = torch.zeros(width, dtype=grad.dtype, device=grad.device) if need_bias else None
    if m == 0 or n == 0 or not (need_gz or need_bias):
        return gz, gb
    tile = pointwise_config(device_arch(grad.device))
    if triton.cdiv(n, tile.block_n) > _MAX_GRID_Y:
        most = _MAX_GRID_Y * tile.block_n
        raise ValueError(f"grad: expected at most {most} columns; got {n}")
    # At most `max_chunks` partial sums per column, whatever M: the second stage stays small and
    # the order of summation depends on the shape alone.
    rows = triton.cdiv(triton.cdiv(m, tile.max_chunks), tile.block_m) * tile.block_m
    chunks = triton.cdiv(m, rows)
    partial = None
    if need_bias:
        partial = torch.empty((chunks, width), dtype=torch.float32, device=grad.device)
    with on_device(grad.device):
        activation_backward[(chunks, triton.cdiv(n, tile.block_n))](
            grad,
            preact,
            gz,
            partial,
            m,
            n,
            *grad.stride(),
            *(preact.stride() if preact is not None else (0, 0)),
            rows,
            ACT=act,
            GATED=gated,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **launch_options(tile.num_warps),
        )
        if partial is not None:
            sum_rows[(triton.cdiv(width, tile.block_n),)](
                partial,
                gb,
                chunks,
                width,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                **launch_options(tile.num_warps),
            )
    return gz, gb


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    preact: Tensor | None,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for x, weight and bias (that of the residual is ``grad`` itself).

    Args:
        grad: dL/dy, [M, N].
        x: [M, K].
        weight: [N, K], or [2N, K] gated.
        preact: z as `forward` stored it; None only where the activation is none.
        activation: code, the position in `activation.NAMES`.
        need_x, need_weight, need_bias: which gradients to compute; the others come back as [0].
        config: tiles to use instead of the committed choice.

    Returns:
        (gx [M, K], gw like weight, gb [N] or [2N]), contiguous, in the dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: unknown activation, a missing ``preact``, or a size past 2^31.
    """
    act, _ = split_code(activation)
    check_alike(x=x, grad=grad, weight=weight, preact=preact)
    plain = act == NONE.value
    if preact is None and not plain:
        raise ValueError(f"preact: expected a tensor for activation {activation}; got None")
    # Without an activation gz is grad; a copy is worth it only where no axis of grad is
    # contiguous (an expanded gradient): the products would load it element by element.
    copy = not plain or 1 not in grad.stride()
    need_gz = (need_x or need_weight) and copy
    gz, gb = preact_gradient(grad, None if plain else preact, activation, need_gz, need_bias)
    if gz is None:
        gz = grad
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    gx = product(gz, weight, config=config)[0] if need_x else nothing
    gw = product(gz.t(), x, config=config)[0] if need_weight else nothing
    return gx, gw, gb if gb is not None else nothing


def explain(
    target: str, dtype: torch.dtype, m: int, rows: int, k: int, activation: int
) -> tuple[dict[str, int | str], str]:
    """Say which config the forward product takes on ``target``, which need not be present.

    Contiguous tensors are assumed; others may take the tile for unaligned products.

    Args:
        target: "sm_90", "gfx942" and so on; or "cuda", the present GPU.
        dtype: of x.
        m, k: x is [m, k].
        rows: of the weight, N or 2N gated.
        activation: code.

    Returns:
        (config fields and the file they come from, the reason).

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unknown activation or target, or "cuda" where torch sees no GPU.
    """
    _, gated = split_code(activation)
    target = arch_of(target)
    n = rows // 2 if gated else rows
    aligned = n % 16 == 0 and k % 16 == 0
    config = choose_config(target, dtype, m, n, k, gated, aligned, aligned and k > 0)
    form, committed = tuned.form_of(FORMS[gated], aligned), f"{table_for(target).device}.json"
    at = tuned.bucket(m, n, k)
    file, where = tuned.cite("fused_linear", target, form, DTYPES[dtype], at, committed)
    by = "persistent form by TMA" if config.persistent else "pointer form"
    kind = f"{'' if aligned else 'un'}aligned {FORMS[gated]} {DTYPES[dtype]}"
    return {**config._asdict(), "file": file}, f"{by}, {kind} tile for {at} {where}"
