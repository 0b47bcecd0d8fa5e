"""Triton kernels of `fused_adamw`, `fused_sgd` and `fused_grad_norm`: many tensors in one launch.

A program finds its tensor in a table of addresses, so that the number of launches does not grow
with the number of tensors. Elements are taken in blocks of 256 of a row, which share the absmax of
an 8-bit state and, where blocks of the whole tensor are met, 32 counters of the random generator; a
tensor of full states is one row. Sums go through one partial sum a program and a second launch that
adds those up in order: no atomics. The launches are in launch.py.
"""

import triton
import triton.language as tl

from bigops.kernels.fused_adamw.states import (
    decode,
    encode,
    random_at,
    random_bits,
    round_stochastic,
)

BLOCK = tl.constexpr(256)

# Rows of the table, each int64 [tensors]; addresses are 0 where a tensor has none. The first one
# says the first program of each tensor.
NUMEL = tl.constexpr(1)
PARAM_AT = tl.constexpr(2)
GRAD_AT = tl.constexpr(3)
FIRST_AT = tl.constexpr(4)  # exp_avg or momentum buffer
SECOND_AT = tl.constexpr(5)  # exp_avg_sq
FIRST_SCALE_AT = tl.constexpr(6)
SECOND_SCALE_AT = tl.constexpr(7)
COPY_AT = tl.constexpr(8)
STREAM = tl.constexpr(9)  # in the low 32 bits, the step of rounding above them
SEED = tl.constexpr(10)
ROW = tl.constexpr(11)  # elements of a row
# Element i is element FIRST + i // RUN * STRIDE + i % RUN of the whole tensor.
FIRST = tl.constexpr(12)
RUN = tl.constexpr(13)
STRIDE = tl.constexpr(14)


@triton.jit
def _find(table, count, depth):
    """(tensor whose program this is, which of its programs); 2^depth is at least count."""
    program = tl.program_id(0)
    low = program * 0
    high = low + count
    for _ in range(depth):
        middle = (low + high) // 2
        right = tl.load(table + middle) <= program
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low, program - tl.load(table + low)


@triton.jit
def _pointer(table, ROW: tl.constexpr, count, index, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + ROW * count + index).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _tiles(numel, chunk, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """(first item, number of tiles of WIDTH items) of a program's chunk of TILES tiles."""
    start0 = chunk.to(tl.int64) * TILES * WIDTH
    tiles = tl.minimum((numel - start0 + WIDTH - 1) // WIDTH, TILES)
    return start0, tiles


@triton.jit
def _row(table, count, index, numel, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """(elements of a row, number of blocks) of a tensor."""
    if ROWS:
        row = tl.load(table + ROW * count + index)
        if ALIGNED:
            row = tl.multiple_of(row, 16)
        blocks = numel // row * ((row + BLOCK - 1) // BLOCK)
    else:
        row = numel
        blocks = (numel + BLOCK - 1) // BLOCK
    return row, blocks


@triton.jit
def _tile(first_block, numel, row, blocks, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile: first element, offsets [BLOCKS, 256], which lie in the tensor, which blocks do."""
    place = tl.arange(0, BLOCK)[None, :]
    if ROWS:
        per_row = (row + BLOCK - 1) // BLOCK
        block = first_block + tl.arange(0, BLOCKS)
        in_blocks = block < blocks
        in_row = block % per_row * BLOCK
        start = first_block * 0
        offsets = (block // per_row * row + in_row)[:, None] + place
        in_tensor = (place < (row - in_row)[:, None]) & in_blocks[:, None]
    else:
        start = first_block * BLOCK
        left = tl.minimum(numel - start, BLOCKS * BLOCK).to(tl.int32)
        offsets = tl.arange(0, BLOCKS)[:, None] * BLOCK + place
        in_tensor = offsets < left
        in_blocks = tl.arange(0, BLOCKS) * BLOCK < left
    return start, offsets, in_tensor, in_blocks


@triton.jit
def _write(
    p,  # float32 [BLOCKS, 256]
    param,  # of the tile's first element
    table,
    count,
    index,
    start,  # the tile's first element
    offsets,
    in_tensor,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The new parameter, and its copy in few bits."""
    if STOCHASTIC:
        stream = tl.load(table + STREAM * count + index)
        seed = tl.load(table + SEED * count + index)
        first = tl.load(table + FIRST * count + index)
        if PARTS:
            run = tl.load(table + RUN * count + index)
            stride = tl.load(table + STRIDE * count + index)
            i = start + offsets
            random = random_at(seed, stream, first + i // run * stride + i % run)
        else:
            random = random_bits(seed, stream, (first + start) // BLOCK, p.shape[0])
        tl.store(param + offsets, round_stochastic(p, random), mask=in_tensor)
    else:
        tl.store(param + offsets, p.to(param.dtype.element_ty), mask=in_tensor)
    if COPY is not None:
        copy = _pointer(table, COPY_AT, count, index, COPY, ALIGNED) + start
        tl.store(copy + offsets, p.to(COPY), mask=in_tensor)


@triton.jit
def adamw_step(
    table,  # int64 [15, count]
    sizes,  # float32 [2, count]: lr / (1 - beta1^n), 1 / sqrt(1 - beta2^n)
    signed_values,  # of `decode` and `encode`; None where the states are float32
    signed_buckets,
    unsigned_values,
    unsigned_buckets,
    count,
    depth,
    factor,
    keep,  # 1 - lr * weight_decay
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,  # of the parameter to the gradient
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    CODED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """AdamW (arXiv 1711.05101, algorithm 2) on the TILES tiles of this program; DECAY: Adam."""
    index, chunk = _find(table, count, depth)
    numel = tl.load(table + NUMEL * count + index)
    STATE: tl.constexpr = tl.uint8 if CODED else tl.float32
    param = _pointer(table, PARAM_AT, count, index, PARAM, ALIGNED)
    grad = _pointer(table, GRAD_AT, count, index, GRAD, ALIGNED)
    first = _pointer(table, FIRST_AT, count, index, STATE, ALIGNED)
    second = _pointer(table, SECOND_AT, count, index, STATE, ALIGNED)
    if CODED:
        first_scales = _pointer(table, FIRST_SCALE_AT, count, index, tl.float32, False)
        second_scales = _pointer(table, SECOND_SCALE_AT, count, index, tl.float32, False)
    size = tl.load(sizes + index)
    inverse = tl.load(sizes + count + index)
    row, blocks = _row(table, count, index, numel, ROWS, ALIGNED)
    block0, tiles = _tiles(blocks, chunk, BLOCKS, TILES)
    for tile in range(tiles):
        block = block0 + tile * BLOCKS
        start, offsets, in_tensor, in_blocks = _tile(block, numel, row, blocks, BLOCKS, ROWS)
        p = tl.load(param + start + offsets, mask=in_tensor, other=0.0).to(tl.float32)
        g = tl.load(grad + start + offsets, mask=in_tensor, other=0.0).to(tl.float32)
        m_tile, v_tile = first + start, second + start
        if CODED:
            m_scale, v_scale = first_scales + block, second_scales + block
            m = decode(m_tile, m_scale, signed_values, offsets, in_tensor, in_blocks)
            v = decode(v_tile, v_scale, unsigned_values, offsets, in_tensor, in_blocks)
        else:
            m = tl.load(m_tile + offsets, mask=in_tensor, other=0.0)
            v = tl.load(v_tile + offsets, mask=in_tensor, other=0.0)
        g *= factor
        if DECAY:
            g += decay * p
        m += one_minus_beta1 * (g - m)
        # g * g would be inf from 1.9e19 on. By powers of two no bit of the usual sizes changes;
        # torch's (one_minus_beta2 * g) * g makes the 8-bit form spill on gfx942 and gfx950.
        h = g * 0.03125
        v = v * beta2 + (1024 * one_minus_beta2) * (h * h)
        p = p * keep - size * tl.div_rn(m, tl.sqrt_rn(v) * inverse + eps)
        if CODED:
            encode(m, m_tile, m_scale, signed_buckets, offsets, in_tensor, in_blocks, True)
            encode(v, v_tile, v_scale, unsigned_buckets, offsets, in_tensor, in_blocks, False)
        else:
            tl.store(m_tile + offsets, m, mask=in_tensor)
            tl.store(v_tile + offsets, v, mask=in_tensor)
        _write(
            p,
            param + start,
            table,
            count,
            index,
            start,
            offsets,
            in_tensor,
            COPY,
            STOCHASTIC,
            PARTS,
            ALIGNED,
        )


@triton.jit
def sgd_step(
    table,  # int64 [15, count]
    signed_values,  # of `decode` and `encode`; None where the buffers are float32
    signed_buckets,
    count,
    depth,
    factor,
    lr,
    momentum,
    fresh,  # 1 - dampening
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    CODED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The update of torch.optim.SGD on the TILES tiles of this program."""
    index, chunk = _find(table, count, depth)
    numel = tl.load(table + NUMEL * count + index)
    STATE: tl.constexpr = tl.uint8 if CODED else tl.float32
    param = _pointer(table, PARAM_AT, count, index, PARAM, ALIGNED)
    grad = _pointer(table, GRAD_AT, count, index, GRAD, ALIGNED)
    if MOMENTUM:
        first = _pointer(table, FIRST_AT, count, index, STATE, ALIGNED)
        if CODED:
            scales = _pointer(table, FIRST_SCALE_AT, count, index, tl.float32, False)
    row, blocks = _row(table, count, index, numel, ROWS, ALIGNED)
    block0, tiles = _tiles(blocks, chunk, BLOCKS, TILES)
    for tile in range(tiles):
        block = block0 + tile * BLOCKS
        start, offsets, in_tensor, in_blocks = _tile(block, numel, row, blocks, BLOCKS, ROWS)
        p = tl.load(param + start + offsets, mask=in_tensor, other=0.0).to(tl.float32)
        g = tl.load(grad + start + offsets, mask=in_tensor, other=0.0).to(tl.float32) * factor
        if DECAY:
            g += weight_decay * p
        if MOMENTUM:
            m_tile = first + start
            if CODED:
                m_scale = scales + block
            if FIRST_STEP:
                m = g
            else:
                if CODED:
                    old = decode(m_tile, m_scale, signed_values, offsets, in_tensor, in_blocks)
                else:
                    old = tl.load(m_tile + offsets, mask=in_tensor, other=0.0)
                m = momentum * old + fresh * g
            if NESTEROV:
                g += momentum * m
            else:
                g = m
            if CODED:
                encode(m, m_tile, m_scale, signed_buckets, offsets, in_tensor, in_blocks, True)
            else:
                tl.store(m_tile + offsets, m, mask=in_tensor)
        p -= lr * g
        _write(
            p,
            param + start,
            table,
            count,
            index,
            start,
            offsets,
            in_tensor,
            COPY,
            STOCHASTIC,
            PARTS,
            ALIGNED,
        )


@triton.jit
def square_sums(
    table,  # int64 [15, count]
    partial,  # float64 out, one for each program
    count,
    depth,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sum of squares of this program's elements, in float64: in float32 those past 2^64 are inf."""
    index, chunk = _find(table, count, depth)
    numel = tl.load(table + NUMEL * count + index)
    grad = _pointer(table, GRAD_AT, count, index, GRAD, ALIGNED)
    WIDTH: tl.constexpr = BLOCKS * BLOCK
    offsets = tl.arange(0, WIDTH)
    start0, tiles = _tiles(numel, chunk, WIDTH, TILES)
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for tile in range(tiles):
        start = start0 + tile * WIDTH
        left = tl.minimum(numel - start, WIDTH).to(tl.int32)
        g = tl.load(grad + start + offsets, mask=offsets < left, other=0.0).to(tl.float64)
        total += g * g
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def norm_of_sums(
    partial,  # float64 [n]
    norm,  # float64 out
    n,
    WIDTH: tl.constexpr,
):
    """norm = sqrt(sum of partial), summed in a fixed order."""
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for start in range(0, n, WIDTH):
        at = start + tl.arange(0, WIDTH)
        total += tl.load(partial + at, mask=at < n, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(total, axis=0)))
