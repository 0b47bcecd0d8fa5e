"""Triton kernels of `sparse_linear` for rows that share their pattern 16 by 16, on matrix units.

The kernels read the values where `bigops.formats.sparse` keeps them;
`bigops.ops.sparse_linear.blocks` says where the blocks lie. A block of HEIGHT rows and WIDTH
columns is HEIGHT / 16 runs of [WIDTH / C, 16, C] values (C columns make a word of 4 bytes), each
one stretch of memory, which a program permutes on chip into an operand of the product. Two kernels
serve three products:

- `block_product`: y = act(x W^T + bias) + residual, a line of blocks being HEIGHT rows of W; and
  gx = gz W, a line being WIDTH columns of W, whose blocks a second list gives. A program makes
  [BLOCK_M, a line] and walks the blocks of its line alone.
- `block_samples`: the gradient of the values, gz^T x at the blocks alone (sampled dense-dense
  product). A program makes a few blocks of one line.

Blocks are 32x32, 16x16 or, for 16x1 and whatever else 16 rows share, 16 rows by one word. The last
would give gx lines of one or two columns, too few for a matrix unit: there its lines have 16
columns, and a block the words of these that are stored, each with an address of its own.

Lines of blocks differ in length: programs are numbered by falling length, so that the hardware,
which starts them in order, gives the long ones out first (longest processing time first; Graham
1969, at most 4/3 of the best schedule). Samples are cut into tasks of equal size. Every sum is made
by one program in a fixed order; there are no atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common import tuned
from bigops.kernels.common.activation import NONE, split_code
from bigops.kernels.common.form_tiles import choose_config, table_for
from bigops.kernels.common.gemm import _finish_tile, _is_aligned, dot_precision
from bigops.kernels.common.launch import launch_options, on_device
from bigops.kernels.common.tiles import DTYPES, TileConfig, device_arch

OP = "sparse_linear"
TASK = 64  # columns of a program of `block_samples`: the rows that wgmma and tcgen05 ask for
_MAX_SIZE = 2**31 - 2**12


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


@triton.jit
def _steps(
    values,
    step,
    across,
    line,
    j,  # first block
    end,  # past the last
    WORDS,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BY_WORD: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Pointers [ENTRIES * PARTS, values of a part] to the values of ENTRIES blocks, and a mask.

    A part of a block is what has an address of its own: 16 rows, or by word 16 rows of a word.
    """
    PARTS: tl.constexpr = WIDTH // C if BY_WORD else HEIGHT // 16
    re = tl.arange(0, ENTRIES * PARTS)
    rw = tl.arange(0, HEIGHT * WIDTH // PARTS)
    inside = j + re // PARTS < end
    at = tl.load(step + tl.cast(j, tl.int64) * PARTS + re, mask=inside, other=-1)
    mask = (at >= 0)[:, None]
    if not EVEN and not BY_WORD:  # the last block of a row has fewer words
        if TRANSPOSED:
            column = line + re * 0
        else:
            column = tl.load(across + j + re // PARTS, mask=inside, other=0)
        mask = mask & ((rw // (16 * C))[None, :] < (WORDS - column * (WIDTH // C))[:, None])
    at = tl.maximum(at, 0).to(tl.int64) * (16 * C)
    return values + at[:, None] + rw[None, :], mask


@triton.jit
def block_product(
    x,  # [M, K]; K counts what is summed over: columns of W, or its rows where TRANSPOSED
    values,  # [steps, 16, C]
    across,
    step,
    first,
    order,
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N] out, rows contiguous
    M,
    N,
    K,
    WORDS,  # of a row of W
    stride_xm,
    stride_xk,
    stride_rm,
    stride_rn,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BY_WORD: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # WIDTH divides the columns of W
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One line of blocks times BLOCK_M rows of x."""
    RUN: tl.constexpr = HEIGHT if TRANSPOSED else WIDTH  # neighbours among what is summed over
    LINE: tl.constexpr = WIDTH if TRANSPOSED else HEIGHT
    ENTRIES: tl.constexpr = BLOCK_K // RUN
    stride_ym = N
    if WIDE:
        stride_ym = tl.cast(N, tl.int64)
        stride_xm = tl.cast(stride_xm, tl.int64)
        stride_xk = tl.cast(stride_xk, tl.int64)
        stride_rm = tl.cast(stride_rm, tl.int64)
        stride_rn = tl.cast(stride_rn, tl.int64)
    # All rows of x by the longest line first: its neighbours read the same values.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    line = tl.load(order + tl.program_id(0) // tiles_m)
    begin = tl.load(first + line)
    end = tl.load(first + line + 1)

    rm = tl.arange(0, BLOCK_M)
    rk = tl.arange(0, BLOCK_K)
    in_m = tile_m * BLOCK_M + rm < M
    x_rows = x + tile_m.to(tl.int64) * BLOCK_M * stride_xm + rm[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, LINE), dtype=tl.float32)
    for k0 in range(0, end - begin, ENTRIES):
        j = begin + k0
        inside = j + rk // RUN < end
        run = tl.load(across + j + rk // RUN, mask=inside, other=0)
        at = tl.max_contiguous(tl.multiple_of(run * RUN + rk % RUN, (RUN,)), (RUN,))
        x_mask = in_m[:, None] & (inside & (at < K))[None, :]
        x_block = tl.load(x_rows + at[None, :] * stride_xk, mask=x_mask, other=0.0)
        # fmt: off
        w_tile, w_mask = _steps(values, step, across, line, j, end, WORDS, C, HEIGHT, WIDTH,
                                ENTRIES, TRANSPOSED, BY_WORD, EVEN)
        # fmt: on
        w = tl.load(w_tile, mask=w_mask, other=0.0)
        w = tl.reshape(w, (ENTRIES, HEIGHT // 16, WIDTH // C, 16, C))
        w = tl.permute(w, (0, 1, 3, 2, 4)) if TRANSPOSED else tl.permute(w, (0, 2, 4, 1, 3))
        w = tl.reshape(w, (BLOCK_K, LINE))
        acc = tl.dot(x_block.to(values.dtype.element_ty), w, acc, input_precision=PRECISION)
    # fmt: off
    _finish_tile(acc, acc, bias, residual, y, None, M, N, stride_rm, stride_rn, stride_ym,
                 tile_m, line * LINE, ACT, False)
    # fmt: on


@triton.jit
def block_samples(
    x,  # [M, K]
    gz,  # [M, N]
    across,
    step,
    first,
    task_line,
    task_first,
    out,  # [steps, 16, C] out: gz^T x at the blocks
    M,
    N,
    K,
    WORDS,
    stride_xm,
    stride_xk,
    stride_gm,
    stride_gn,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,  # TASK
    BLOCK_K: tl.constexpr,  # rows of x and gz at a time
):
    """The values' gradient at COLUMNS / WIDTH blocks of one row of blocks."""
    ENTRIES: tl.constexpr = COLUMNS // WIDTH
    if WIDE:
        stride_xm = tl.cast(stride_xm, tl.int64)
        stride_xk = tl.cast(stride_xk, tl.int64)
        stride_gm = tl.cast(stride_gm, tl.int64)
        stride_gn = tl.cast(stride_gn, tl.int64)
    line = tl.load(task_line + tl.program_id(0))
    j = tl.load(task_first + tl.program_id(0))
    end = tl.load(first + line + 1)
    rm = tl.arange(0, BLOCK_K)
    rc = tl.arange(0, COLUMNS)
    rn = line * HEIGHT + tl.arange(0, HEIGHT)
    inside = j + rc // WIDTH < end
    run = tl.load(across + j + rc // WIDTH, mask=inside, other=0)
    at = tl.max_contiguous(tl.multiple_of(run * WIDTH + rc % WIDTH, (WIDTH,)), (WIDTH,))
    in_k = inside & (at < K)
    x_tile = x + rm[:, None] * stride_xm + at[None, :] * stride_xk
    g_tile = gz + rm[:, None] * stride_gm + rn[None, :] * stride_gn
    acc = tl.zeros((COLUMNS, HEIGHT), dtype=tl.float32)
    for m0 in range(0, M, BLOCK_K):
        in_m = rm < M - m0
        x_block = tl.load(x_tile, mask=in_m[:, None] & in_k[None, :], other=0.0)
        g_block = tl.load(g_tile, mask=in_m[:, None] & (rn < N)[None, :], other=0.0)
        x_block = x_block.to(out.dtype.element_ty)
        g_block = g_block.to(out.dtype.element_ty)
        acc = tl.dot(tl.trans(x_block), g_block, acc, input_precision=PRECISION)
        x_tile += tl.cast(BLOCK_K, tl.int64) * stride_xm
        g_tile += tl.cast(BLOCK_K, tl.int64) * stride_gm
    # [columns, rows] -> entry, rows by 16, word, row, column of the word
    g = tl.reshape(acc, (ENTRIES, WIDTH // C, C, HEIGHT // 16, 16))
    g = tl.reshape(tl.permute(g, (0, 3, 1, 4, 2)), (ENTRIES * (HEIGHT // 16), WIDTH * 16))
    # fmt: off
    tile, mask = _steps(out, step, across, line, j, end, WORDS, C, HEIGHT, WIDTH, ENTRIES, False,
                        False, EVEN)
    # fmt: on
    tl.store(tile, g.to(out.dtype.element_ty), mask=mask)


def _check(x: Tensor, values: Tensor, **others: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"x: expected one of {allowed}; got {x.dtype}")
    held = (torch.bfloat16,) if x.dtype == torch.bfloat16 else ()
    if values.dtype not in (torch.float32, *held):
        raise TypeError(
            f"values: expected torch.float32, or torch.bfloat16 like x; got {values.dtype}"
        )
    for name, t in {"x": x, "values": values, **others}.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, that of x; got {t.device}")
        if name != "values" and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype}, that of x; got {t.dtype}")
        if max(t.shape, default=0) > _MAX_SIZE and name != "values":
            raise ValueError(f"{name}: expected sizes up to {_MAX_SIZE}; got {tuple(t.shape)}")


def _config(
    form: str, values: Tensor, m: int, blocks: Blocks, read: list[Tensor], n: int
) -> TileConfig:
    aligned = n % 16 == 0 and all(map(_is_aligned, read))
    arch = device_arch(values.device)
    config = choose_config(OP, arch, form, values.dtype, m, blocks.height, aligned)
    assert config is not None, "a config file without a block of 32"
    return config


def _wide(*reaches: int) -> bool:
    return 2 * max(reaches) >= 2**31


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
        config = _config(form, values, m, blocks, [x] if residual is None else [x, residual], n)
    lines = blocks.columns if transposed else blocks.rows
    columns = n if transposed else k  # of W
    c = values.shape[2]
    stride_r = residual.stride() if residual is not None else (0, 0)
    grid = (lines.order.numel() * triton.cdiv(m, config.block_m),)
    with on_device(x.device):
        block_product[grid](
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
            WIDE=_wide(
                config.block_m * max(x.stride(0), stride_r[0], n),
                (k + 64) * x.stride(1),
                32 * stride_r[1],
            ),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            **launch_options(config.num_warps, config.num_stages),
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
    act, gated = split_code(activation)
    if gated:
        raise ValueError(f"activation: expected the code of no gated pair; got {activation}")
    _check(x, values, bias=bias, residual=residual)
    flat = None if bias is None else bias.contiguous()
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
        config = _config("sampled", values, m, blocks, [x, gz], n)
    lines, c = blocks.rows, values.shape[2]
    with on_device(x.device):
        block_samples[(blocks.task_line.numel(),)](
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
            WIDE=_wide(
                config.block_k * max(x.stride(0), gz.stride(0)),
                (k + 64) * x.stride(1),
                (n + 64) * gz.stride(1),
            ),
            COLUMNS=TASK,
            BLOCK_K=config.block_k,
            **launch_options(config.num_warps, config.num_stages),
        )
    return out


def traffic(
    m: int, n: int, k: int, stored: int, lines: int, size: int, itemsize: int, config: TileConfig
) -> tuple[int, int]:
    """Bytes of `forward` by formula: (read of x and W, written).

    Args:
        m, n, k: x is [m, k], y [m, n].
        stored: blocks.
        lines: rows of blocks.
        size: values of a block, HEIGHT * WIDTH with HEIGHT * ``lines`` = n.
        itemsize: of x, y and the values.
        config: the tile.
    """
    height = triton.cdiv(n, lines)
    tiles_m = triton.cdiv(m, config.block_m)
    return itemsize * stored * (m * size // height + tiles_m * size), itemsize * m * n


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
