"""Dense products of the linear ops: the tile, the form of the kernel, the launch.

Two kernels serve: `gemm.gemm`, whose programs make one tile each by pointers, and
`gemm_persistent.gemm_persistent`, which reads by TMA. The config says which; whatever it says, the
pointer form serves operands that have no tensor descriptor, and strides that want 64-bit offsets.
"""

import torch
import triton
from torch import Tensor

from bigops.kernels.common.activation import NONE
from bigops.kernels.common.gemm import _is_aligned, dot_precision, gemm
from bigops.kernels.common.gemm_persistent import (
    described,
    gemm_persistent,
    row_step,
    rows_are_rows,
    with_scratch,
)
from bigops.kernels.common.launch import launch_options, on_device
from bigops.kernels.common.tiles import TileConfig, choose_config, device_arch, multiprocessors


def product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: int = NONE.value,
    gated: bool = False,
    with_preact: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(a b + bias) + residual and, if asked for, a b + bias; a [M, K], b [K, N] or [K, 2N]."""
    m, k = a.shape
    n = b.shape[1] // 2 if gated else b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    preact = torch.empty((m, b.shape[1]), dtype=a.dtype, device=a.device) if with_preact else None
    if m == 0 or n == 0:
        return out, preact
    mapped = k > 0 and described(a) and described(b)
    if config is None:
        read = (a, b) if residual is None else (a, b, residual)
        aligned = n % 16 == 0 and all(map(_is_aligned, read))
        arch = device_arch(a.device)
        config = choose_config(arch, a.dtype, m, n, k, gated, aligned, aligned and mapped)
    stride_r = residual.stride() if residual is not None else (0, 0)
    reach = max(
        config.block_m * max(a.stride(0), stride_r[0], b.shape[1]),
        config.block_n * max(b.stride(1), stride_r[1]),
        config.block_k * max(a.stride(1), b.stride(0)),
    )
    wide = 2 * reach >= 2**31
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    given = (a, b, bias, residual, out, preact, m, n, k)
    constants = {
        "ACT": act,
        "GATED": gated,
        "PRECISION": dot_precision(a.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
        **launch_options(config.num_warps, config.num_stages),
    }
    with on_device(a.device):
        if config.persistent and mapped and not wide:
            programs = min(tiles, config.programs * multiprocessors(a.device))
            rows = {"A_ROWS": rows_are_rows(a), "B_ROWS": rows_are_rows(b)}
            strides = (row_step(a), row_step(b), *stride_r)
            with_scratch(
                a.device,
                lambda: gemm_persistent[(programs,)](*given, *strides, **rows, **constants),
            )
        else:
            gemm[(tiles,)](
                *given,
                *a.stride(),
                *b.stride(),
                *stride_r,
                EVEN_K=k % config.block_k == 0,
                WIDE=wide,
                **constants,
            )
    return out, preact
