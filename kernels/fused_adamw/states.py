"""What optimiser steps store in few bits, for Triton kernels: 8-bit states, stochastic rounding.

The meaning is that of bigops/ops/fused_adamw/states.py: the dynamic map of Dettmers et al. (2021,
arXiv 2110.02861) with one absmax for 256 elements, and the random bits of Philox4x32-10 (Salmon et
al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
"""

import triton
import triton.language as tl

BUCKETS = tl.constexpr(22 * 128)  # of magnitudes in [2^-22, 1), by exponent and 7 bits of mantissa
LOWEST = tl.constexpr((127 - 22) << 7)  # 2^-22 in those bits


@triton.jit
def _philox(counter, seed, stream):
    """Four words of Philox4x32-10 for each 64-bit counter and the 64 bits of ``stream``."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (stream >> 32).to(tl.uint32)
    k0 = tl.zeros_like(c0) + seed.to(tl.uint32)
    k1 = tl.zeros_like(c0) + (seed >> 32).to(tl.uint32)
    a = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    b = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        n0 = tl.umulhi(b, c2) ^ c1 ^ k0
        n2 = tl.umulhi(a, c0) ^ c3 ^ k1
        c1 = b * c2
        c3 = a * c0
        c0 = n0
        c2 = n2
        k0 += tl.full(c0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def random_at(
    seed,  # int64, and below
    stream,  # in the low 32 bits, the step above them
    index,
):
    """`random_bits` of any elements, a draw for each: blocks that begin anywhere."""
    c0, c1, c2, c3 = _philox((index >> 8) * 32 + (index & 31), seed, stream)
    j = (index >> 5).to(tl.int32) & 7
    word = tl.where(j < 4, tl.where(j < 2, c0, c1), tl.where(j < 6, c2, c3))
    return tl.where(j % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def random_bits(
    seed,  # int64, and below
    stream,  # in the low 32 bits, the step above them
    first_block,
    BLOCKS: tl.constexpr,
):
    """16 random bits for each element of so many blocks, uint32 [BLOCKS, 256], by Philox4x32-10.

    Element 32 j + lane takes half j % 2 of word j / 2 of counter (32 block + lane, stream, step).
    """
    block = first_block + tl.arange(0, BLOCKS).to(tl.int64)
    counter = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    c0, c1, c2, c3 = _philox(counter, seed, stream)
    # [blocks, lane, half, word / 2, word % 2] -> [blocks, 256]
    even = tl.join(tl.join(c0 & 0xFFFF, c0 >> 16), tl.join(c2 & 0xFFFF, c2 >> 16))
    odd = tl.join(tl.join(c1 & 0xFFFF, c1 >> 16), tl.join(c3 & 0xFFFF, c3 >> 16))
    words = tl.permute(tl.join(even, odd), (0, 3, 4, 2, 1))
    return tl.reshape(words, (BLOCKS, 256))


@triton.jit
def round_stochastic(x, random):
    """float32 to bfloat16, up with a probability of what truncation would drop."""
    bits = x.to(tl.uint32, bitcast=True)
    special = (bits & 0x7F800000) == 0x7F800000
    quiet = tl.where((bits & 0x7FFFFF) != 0, bits | 0x400000, bits)
    bits = tl.where(special, quiet, bits + random)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode(
    codes,  # uint8, of the tile's first element
    scale,  # float32, of the tile's first block
    values,  # float32 [256]
    offsets,  # [blocks, 256], and whether they lie in the tensor
    in_tensor,
    in_blocks,  # [blocks]
):
    """The tile of an 8-bit state in float32."""
    code = tl.load(codes + offsets, mask=in_tensor, other=0).to(tl.int32)
    absmax = tl.load(scale + tl.arange(0, offsets.shape[0]), mask=in_blocks, other=0.0)
    return tl.load(values + code) * absmax[:, None]


@triton.jit
def encode(
    x,  # float32 [blocks, 256]
    codes,
    scale,
    buckets,  # int32 [22 * 128 + 1]: low 8 bits an index, above them where the next one begins
    offsets,
    in_tensor,
    in_blocks,
    SIGNED: tl.constexpr,
):
    """Store the codes of the nearest values of the map and the absmax of each block."""
    x = tl.where(in_tensor, x, 0.0)
    # Magnitudes order as their bits, NaN above inf: a broken state stays visible.
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = top.to(tl.float32, bitcast=True)
    divisor = tl.where(absmax > 0, absmax, 1.0)
    q = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    bits = q.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bucket = tl.minimum(tl.maximum((bits >> 16) - LOWEST, -1), BUCKETS - 1)
    found = tl.load(buckets + bucket + 1)
    index = (found & 0xFF) + (bits > (found & -256)).to(tl.int32)
    if SIGNED:  # 127 negative values, 0, 128 positive ones
        code = tl.where(x < 0, tl.maximum(127 - index, 0), 127 + index)
    else:  # above 0 never becomes 0: a denominator of 0 would be a leap
        code = tl.where((index == 0) & (x > 0), 1, index)
    tl.store(codes + offsets, code.to(tl.uint8), mask=in_tensor)
    tl.store(scale + tl.arange(0, x.shape[0]), absmax, mask=in_blocks)
