"""Triton kernel that rounds rows of x to e4m3fn, for `fp8_linear`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.launch import check_operands, contiguous, launch_options, on_device
from bigops.kernels.common.scaled_dot import TINY
from bigops.kernels.common.tiles import device_arch
from bigops.kernels.fp8_linear.tiles import BLOCK, row_config

LARGEST = tl.constexpr(448.0)  # of e4m3fn, which has no infinity
_PADDED = 128  # codes of a row of x are filled up with zeros to whole blocks of any config


@triton.jit
def _code(v):
    """The e4m3fn code of float32 |v| <= 448: nearest, ties to even; +0 for what rounds to 0.

    By whole numbers: below sm_89 no instruction casts, and elsewhere the code is the same.
    """
    a = tl.abs(v)
    bits = a.to(tl.int32, bitcast=True)
    # 20 of the 23 bits go; biases are 127 and 7. Below 2^-6 steps are 2^-9, as from 2^14 on.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (a + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(a < 0.015625, small, normal)
    return tl.where((v < 0.0) & (code > 0), code + 128, code).to(tl.uint8)


@triton.jit
def quantize_fp8(
    x,  # [M, K]
    given,  # float32 [1], the scale of x; None: the largest magnitude says it
    q,  # uint8 [M, stride_q] out: codes, 0 beyond K
    x_scale,  # float32 [groups, M] out; NaN for what holds NaN or inf
    M,
    K,
    stride_xm,
    stride_xk,
    stride_q,
    GROUP: tl.constexpr,  # columns that share a scale, a multiple of BLOCK_N; 0: all of a row
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Codes of BLOCK_M rows of x, to the bit as `bigops.formats.fp8.act_quant` has them.

    Two passes: the second reads from cache what the first saw. To be launched without fusion of
    products and sums.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    cols = tl.arange(0, BLOCK_N)
    in_m = rows < M
    x_rows = x + rows.to(tl.int64)[:, None] * stride_xm
    first = group * GROUP
    end = stride_q if GROUP == 0 else first + GROUP
    largest = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k0 in range(first, end, BLOCK_N):
        at = k0 + cols
        mask = in_m[:, None] & (at < K)[None, :]
        v = tl.load(x_rows + at.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0.0)
        v = tl.abs(v.to(tl.float32))
        largest = tl.maximum(largest, v)
        odd = tl.maximum(odd, tl.where(v < float("inf"), 0, 1))
    finite = tl.max(odd, axis=1) == 0
    one = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if given is not None:
        scale = one * tl.load(given)
    else:
        scale = tl.maximum(tl.div_rn(tl.max(largest, axis=1), one * LARGEST), TINY)
    inverse = tl.div_rn(one, scale)
    q_rows = q + rows.to(tl.int64)[:, None] * stride_q
    for k0 in range(first, end, BLOCK_N):
        at = k0 + cols
        mask = in_m[:, None] & (at < K)[None, :]
        v = tl.load(x_rows + at.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0.0)
        v = tl.minimum(tl.maximum(v.to(tl.float32) * inverse[:, None], -LARGEST), LARGEST)
        v = tl.where(mask & finite[:, None], v, 0.0)
        tl.store(q_rows + at[None, :], _code(v), mask=in_m[:, None] & (at < stride_q)[None, :])
    out = x_scale + tl.cast(group, tl.int64) * M + rows
    tl.store(out, tl.where(finite, scale, float("nan")), mask=in_m)


def quantize_activations(
    x: Tensor, block: bool = False, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of x as e4m3fn, to the bit those of `bigops.formats.fp8.act_quant`.

    Args:
        x: [M, K], float32, bfloat16 or float16, any strides.
        block: each 128 columns of a row have a scale; else the row has one.
        x_scale: float32 [1], the scale of all of x; None: the largest magnitude / 448. What lies
            beyond 448 scales becomes 448.

    Returns:
        (codes uint8 [M, K rounded up to 128], 0 beyond K; scales float32 [groups, M], NaN for a
        row or block that holds NaN or inf).

    Raises:
        TypeError: a dtype that is not served.
        ValueError: tensors on different devices, or a size past 2^31.
    """
    check_operands(x, x_scale=x_scale)
    m, k = x.shape
    q = torch.empty((m, -(-k // _PADDED) * _PADDED), dtype=torch.uint8, device=x.device)
    groups = q.shape[1] // BLOCK if block else 1
    by = torch.empty((groups, m), dtype=torch.float32, device=x.device)
    if m and groups:
        tile = row_config(device_arch(x.device))
        block_n = min(tile.block_n, BLOCK) if block else tile.block_n
        block_m = tile.block_m * (tile.block_n // block_n)
        with on_device(x.device):
            quantize_fp8[(triton.cdiv(m, block_m), groups)](
                x,
                contiguous(x_scale),
                q,
                by,
                m,
                k,
                *x.stride(),
                q.shape[1],
                GROUP=BLOCK if block else 0,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                **launch_options(tile.num_warps, fp_fusion=False),
            )
    return q, by
