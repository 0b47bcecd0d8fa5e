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

import triton
import triton.language as tl

from bigops.kernels.common.epilogue import finish_tile
from bigops.kernels.common.tile_walk import wide_strides


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
    stride_ym, stride_xm, stride_xk, stride_rm, stride_rn = wide_strides(
        (N, stride_xm, stride_xk, stride_rm, stride_rn), WIDE
    )
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
        w_tile, w_mask = _steps(
            values,
            step,
            across,
            line,
            j,
            end,
            WORDS,
            C,
            HEIGHT,
            WIDTH,
            ENTRIES,
            TRANSPOSED,
            BY_WORD,
            EVEN,
        )
        w = tl.load(w_tile, mask=w_mask, other=0.0)
        w = tl.reshape(w, (ENTRIES, HEIGHT // 16, WIDTH // C, 16, C))
        w = tl.permute(w, (0, 1, 3, 2, 4)) if TRANSPOSED else tl.permute(w, (0, 2, 4, 1, 3))
        w = tl.reshape(w, (BLOCK_K, LINE))
        acc = tl.dot(x_block.to(values.dtype.element_ty), w, acc, input_precision=PRECISION)
    finish_tile(
        acc,
        acc,
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
        line * LINE,
        ACT,
        False,
    )


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
    stride_xm, stride_xk, stride_gm, stride_gn = wide_strides(
        (stride_xm, stride_xk, stride_gm, stride_gn), WIDE
    )
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
    tile, mask = _steps(
        out, step, across, line, j, end, WORDS, C, HEIGHT, WIDTH, ENTRIES, False, False, EVEN
    )
    tl.store(tile, g.to(out.dtype.element_ty), mask=mask)
