"""Dense products of the linear ops: the tile, the form of the kernel, the launch.

Two kernels serve: `gemm.gemm`, whose programs make one tile each by pointers, and
`gemm_persistent.gemm_persistent`, which reads by TMA. The config says which; whatever it says, the
pointer form serves operands that have no tensor descriptor, and strides that want 64-bit offsets.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from bigops.kernels.common.activation import NONE
from bigops.kernels.common.gemm import gemm
from bigops.kernels.common.gemm_persistent import (
    described,
    gemm_persistent,
    row_step,
    rows_are_rows,
    with_scratch,
)
from bigops.kernels.common.launch import (
    dot_precision,
    is_wide,
    launch_product,
    product_is_aligned,
    strides,
)
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
        aligned = product_is_aligned(n, a, b, residual)
        arch = device_arch(a.device)
        config = choose_config(arch, a.dtype, m, n, k, gated, aligned, aligned and mapped)
    stride_r = strides(residual)
    wide = is_wide(
        config.block_m * max(a.stride(0), stride_r[0], b.shape[1]),
        config.block_n * max(b.stride(1), stride_r[1]),
        config.block_k * max(a.stride(1), b.stride(0)),
    )
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    rest = (b, bias, residual, out, preact, m, n, k)
    constants: dict[str, Any] = {"ACT": act, "GATED": gated, "PRECISION": dot_precision(a.dtype)}
    if config.persistent and mapped and not wide:
        programs = min(tiles, config.programs * multiprocessors(a.device))
        steps = (row_step(a), row_step(b), *stride_r)
        constants |= {"A_ROWS": rows_are_rows(a), "B_ROWS": rows_are_rows(b)}
        launch = functools.partial(launch_product, gemm_persistent, programs, config)
        with_scratch(a.device, lambda: launch(a, *rest, *steps, **constants))
    else:
        steps = (*a.stride(), *b.stride(), *stride_r)
        constants |= {"EVEN_K": k % config.block_k == 0, "WIDE": wide}
        launch_product(gemm, tiles, config, a, *rest, *steps, **constants)
    return out, preact
