"""Launches of the kernels of `sparse_linear`: where blocks lie, checks, tiles, three products."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bigops.kernels.common import tuned
from bigops.kernels.common.activation import NONE, ungated_code
from bigops.kernels.common.form_tiles import choose_config, table_for
from bigops.kernels.common.launch import (
    check_dtype,
    check_operands,
    contiguous,
    dot_precision,
    is_wide,
    launch_product,
    product_is_aligned,
    strides,
)
from bigops.kernels.common.tiles import DTYPES, TileConfig, device_arch
from bigops.kernels.sparse_linear.kernels import block_product, block_samples

OP = "sparse_linear"
TASK = 64  # columns of a program of `block_samples`: the rows that wgmma and tcgen05 ask for


class Lines(NamedTuple):
    """Blocks by line (rows of blocks, or columns of them), each line's in rising order."""

    width: int  # of a block: 32, 16, or C
    by_word: bool  # step has an entry for each word of a block
    across: Tensor  # int32 [blocks]: column of the block (rows of blocks), or row
    step: Tensor  # int32 [blocks, HEIGHT / 16]: first step of its values, -1 beyond the last row;
    # or by word [blocks, WIDTH / C], -1 for what is not stored
    first: Tensor  # int32 [lines + 1]: first block of each line
    order: Tensor  # int32 [lines]: lines by falling length


class Blocks(NamedTuple):
    """Where the blocks of a weight lie; `bigops.ops.sparse_linear.blocks.find` makes it."""

    height: int  # 16 or 32
    rows: Lines
    columns: Lines
    task_line: Tensor  # int32 [tasks]: row of blocks
    task_first: Tensor  # int32 [tasks]: first block; a task ends TASK columns on, or with its row


def _check(x: Tensor, values: Tensor, **others: Tensor | None) -> None:
    check_dtype("x", x)
    held = (torch.bfloat16,) if x.dtype == torch.bfloat16 else ()
    if values.dtype not in (torch.float32, *held):
        raise TypeError(
            f"values: expected torch.float32, or torch.bfloat16 like x; got {values.dtype}"
        )
    if values.device != x.device:
        raise ValueError(f"values: expected device {x.device}, that of x; got {values.device}")
    check_operands(x, **others)


def _config(
    form: str, values: Tensor, m: int, blocks: Blocks, n: int, *read: Tensor | None
) -> TileConfig:
    arch, aligned = device_arch(values.device), product_is_aligned(n, *read)
    config = choose_config(OP, arch, form, values.dtype, m, blocks.height, aligned)
    assert config is not None, "a config file without a block of 32"
    return config


def _product(
    x: Tensor,
    values: Tensor,
    blocks: Blocks,
    transposed: bool,
    n: int,
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    dtype: torch.dtype,
    config: TileConfig | None,
) -> Tensor:
    m, k = x.shape
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    if config is None:
        form = "transposed" if transposed else "forward"
        config = _config(form, values, m, blocks, n, x, residual)
    lines = blocks.columns if transposed else blocks.rows
    columns = n if transposed else k  # of W
    c = values.shape[2]
    stride_r = strides(residual)
    launch_product(
        block_product,
        lines.order.numel() * triton.cdiv(m, config.block_m),
        config,
        x,
        values.contiguous(),
        lines.across,
        lines.step,
        lines.first,
        lines.order,
        bias,
        residual,
        y,
        m,
        n,
        k,
        triton.cdiv(columns, c),
        *x.stride(),
        *stride_r,
        C=c,
        HEIGHT=blocks.height,
        WIDTH=lines.width,
        TRANSPOSED=transposed,
        BY_WORD=lines.by_word,
        ACT=act,
        PRECISION=dot_precision(values.dtype),
        EVEN=columns % lines.width == 0,
        WIDE=is_wide(
            config.block_m * max(x.stride(0), stride_r[0], n),
            (k + 64) * x.stride(1),
            32 * stride_r[1],
        ),
    )
    return y


def forward(
    x: Tensor,
    values: Tensor,
    blocks: Blocks,
    n: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """act(x W^T + bias) + residual.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, here and below.
        values: [steps, 16, C]: float32, C = 1, or with a bfloat16 x bfloat16, C = 2.
        blocks: where they lie.
        n: N, the rows of W.
        bias: [N] in x's dtype.
        residual: [M, N] in x's dtype.
        activation: code, the position in `activation.NAMES`; no gated pair.
        dtype: of the result, None for x's.
        config: tiles to use instead of the committed choice.

    Returns:
        [M, N], contiguous.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: a gated or unknown activation, differing devices, or a size past 2^31.
    """
    act = ungated_code(activation)
    _check(x, values, bias=bias, residual=residual)
    flat = contiguous(bias)
    return _product(x, values, blocks, False, n, flat, residual, act, dtype or x.dtype, config)


def transposed(
    gz: Tensor, values: Tensor, blocks: Blocks, k: int, config: TileConfig | None = None
) -> Tensor:
    """gz W, [M, K], the gradient of x; gz [M, N], K columns of W. Raises as `forward`."""
    _check(gz, values)
    return _product(gz, values, blocks, True, k, None, None, NONE.value, gz.dtype, config)


def sampled(
    gz: Tensor, x: Tensor, values: Tensor, blocks: Blocks, config: TileConfig | None = None
) -> Tensor:
    """gz^T x at the stored positions, like values; gz [M, N], x [M, K]. Raises as `forward`."""
    _check(x, values, gz=gz)
    (m, k), n = x.shape, gz.shape[1]
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    if m == 0 or blocks.task_line.numel() == 0:
        return out
    if config is None:
        config = _config("sampled", values, m, blocks, n, x, gz)
    lines, c = blocks.rows, values.shape[2]
    launch_product(
        block_samples,
        blocks.task_line.numel(),
        config,
        x,
        gz,
        lines.across,
        lines.step,
        lines.first,
        blocks.task_line,
        blocks.task_first,
        out,
        m,
        n,
        k,
        triton.cdiv(k, c),
        *x.stride(),
        *gz.stride(),
        C=c,
        HEIGHT=blocks.height,
        WIDTH=lines.width,
        PRECISION=dot_precision(values.dtype),
        EVEN=k % lines.width == 0,
        WIDE=is_wide(
            config.block_k * max(x.stride(0), gz.stride(0)),
            (k + 64) * x.stride(1),
            (n + 64) * gz.stride(1),
        ),
        COLUMNS=TASK,
    )
    return out


def explain(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, height: int, width: int
) -> tuple[dict[str, int | str], str]:
    """Say which config the forward product takes on ``target``, which need not be present.

    Contiguous tensors are assumed; others may take the tile for unaligned products.

    Args:
        target: "sm_90", "gfx942" and so on.
        dtype: of the values.
        m, k: x is [m, k].
        n: rows of W.
        height, width: of a block.

    Returns:
        (config fields and the file they come from, the reason).

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unknown target.
    """
    aligned = n % 16 == 0 and k % 16 == 0
    config = choose_config(OP, target, "forward", dtype, m, height, aligned)
    assert config is not None, "a config file without a block of 32"
    committed = f"{OP}/{table_for(OP, target).device}.json"
    form, at = tuned.form_of("forward", aligned, height), tuned.bucket(m)
    file, where = tuned.cite(OP, target, form, DTYPES[dtype], at, committed)
    kind = f"{'' if aligned else 'un'}aligned {height}x{width} {DTYPES[dtype]}"
    return {**config.of_one_form(), "file": file}, f"{kind} tile for {m} rows {where}"
