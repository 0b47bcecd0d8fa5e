"""Triton kernel that gives rows of x u8 numbers, for `quantized_linear` and `sparse_linear`.

The numbers are stored less 128, so that they are signed as the matrix units want them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.launch import check_operands, contiguous, launch_options, on_device
from bigops.kernels.common.scaled_dot import TINY
from bigops.kernels.common.tiles import device_arch
from bigops.kernels.quantized_linear.tiles import row_config

MODES = {"dynamic": 0, "symmetric": 1, "static": 2}
SYMMETRIC = tl.constexpr(1)
STATIC = tl.constexpr(2)
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers, ties to even
_PADDED = 128  # quantised rows are filled up with zeros to whole blocks of any config


@triton.jit
def _round(x):
    """The nearest whole number of |x| < 2^22; no rounding function exists on every back end."""
    return (x + _WHOLE) - _WHOLE


@triton.jit
def act_quant(
    x,  # [M, K]
    grid,  # float32 [2], scale and zero point of x; None unless STATIC
    q,  # int8 [M, stride_q] out: u8 numbers less 128, 0 beyond K
    x_scale,  # float32 [M] out; NaN for a row that holds NaN or inf
    x_zero,  # int32 [M] out, less 128
    x_sum,  # int32 [M] out: sums of q
    M,
    K,
    stride_xm,
    stride_xk,
    stride_q,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Quantise BLOCK_M rows of x to the bit as `bigops.formats.quantize.act_quant` does.

    Two passes: the second reads from cache what the first saw. To be launched without fusion of
    products and sums, which would round x * inverse otherwise than plain torch.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_m = rows < M
    x_rows = x + rows.to(tl.int64)[:, None] * stride_xm
    low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    high = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k0 in range(0, K, BLOCK_N):
        at = k0 + cols
        mask = in_m[:, None] & (at < K)[None, :]
        v = tl.load(x_rows + at.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0.0)
        v = v.to(tl.float32)
        low = tl.minimum(low, v)
        high = tl.maximum(high, v)
        odd = tl.maximum(odd, tl.where(tl.abs(v) < float("inf"), 0, 1))
    lo = tl.min(low, axis=1)
    hi = tl.max(high, axis=1)
    finite = tl.max(odd, axis=1) == 0
    one = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    least = 0.0
    if MODE == STATIC:
        scale = one * tl.load(grid)
        zero = one * tl.load(grid + 1)
    elif MODE == SYMMETRIC:
        scale = tl.maximum(tl.div_rn(tl.maximum(-lo, hi), one * 127.0), TINY)
        zero = one * 128.0
        least = 1.0
    else:
        scale = tl.maximum(tl.div_rn(hi, one * 255.0) - tl.div_rn(lo, one * 255.0), TINY)
        zero = _round(tl.where(finite, -lo * tl.div_rn(one, scale), 0.0))
        zero = tl.minimum(tl.maximum(zero, 0.0), 255.0)
    inverse = tl.div_rn(one, scale)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    q_rows = q + rows.to(tl.int64)[:, None] * stride_q
    for k0 in range(0, stride_q, BLOCK_N):
        at = k0 + cols
        mask = in_m[:, None] & (at < K)[None, :]
        v = tl.load(x_rows + at.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0.0)
        # any |x * inverse| past 512 ends up at an end of the range, whatever the zero point
        v = tl.minimum(tl.maximum(v.to(tl.float32) * inverse[:, None], -512.0), 512.0)
        v = tl.minimum(tl.maximum(_round(v) + zero[:, None], least), 255.0) - 128.0
        whole = tl.where(mask & finite[:, None], v, 0.0).to(tl.int32)
        total += whole
        inside = in_m[:, None] & (at < stride_q)[None, :]
        tl.store(q_rows + at[None, :], whole.to(tl.int8), mask=inside)
    tl.store(x_scale + rows, tl.where(finite, scale, float("nan")), mask=in_m)
    tl.store(x_zero + rows, zero.to(tl.int32) - 128, mask=in_m)
    tl.store(x_sum + rows, tl.sum(total, axis=1), mask=in_m)


def quantize_activations(
    x: Tensor, activations: str, qparams: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x as whole numbers, to the bit those of `bigops.formats.quantize.act_quant`.

    Args:
        x: [M, K], float32, bfloat16 or float16, any strides.
        activations: "dynamic", "symmetric" or "static".
        qparams: float32 [2], scale and zero point, with "static".

    Returns:
        (q int8 [M, K rounded up to 128], u8 numbers less 128 and 0 beyond K; scale float32 [M];
        zero point less 128, int32 [M]; sums of q, int32 [M]).

    Raises:
        TypeError: a dtype that is not served.
        ValueError: tensors on different devices, or a size past 2^31.
    """
    check_operands(x, x_qparams=qparams)
    m, k = x.shape
    q = torch.empty((m, -(-k // _PADDED) * _PADDED), dtype=torch.int8, device=x.device)
    by = torch.empty((m,), dtype=torch.float32, device=x.device)
    zero = torch.empty((m,), dtype=torch.int32, device=x.device)
    sums = torch.empty((m,), dtype=torch.int32, device=x.device)
    if m:
        tile = row_config(device_arch(x.device))
        with on_device(x.device):
            act_quant[(triton.cdiv(m, tile.block_m),)](
                x,
                contiguous(qparams),
                q,
                by,
                zero,
                sums,
                m,
                k,
                *x.stride(),
                q.shape[1],
                MODE=MODES[activations],
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                **launch_options(tile.num_warps, fp_fusion=False),
            )
    return q, by, zero, sums
