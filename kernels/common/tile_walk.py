"""How a program of a product walks: its tile, the masks of a step, offsets of 64 bits."""

import triton
import triton.language as tl


@triton.jit
def banded_tile(
    index,
    tiles_m,
    band,  # tiles of a band: GROUP_M times the tiles of a row, which a loop over tiles makes once
    GROUP_M: tl.constexpr,
):
    """(row, column) of the tile with number ``index``.

    Bands of GROUP_M tile rows are walked column by column, so that neighbouring programs share both
    rows of the left factor and columns of the right one in the L2 cache.
    """
    first_m = (index // band) * GROUP_M
    band_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (index % band) % band_rows
    tile_n = (index % band) // band_rows
    return tile_m, tile_n


@triton.jit
def wide_strides(strides, WIDE: tl.constexpr):
    """``strides`` in 64 bits where WIDE, else as they are.

    Bases of tiles are 64 bit; offsets inside a tile stay 32 bit unless a stride is enormous.
    """
    if WIDE:
        strides = tl.tuple([tl.cast(stride, tl.int64) for stride in strides])
    return strides


@triton.jit
def step_masks(in_m, in_n, rk, K, k0, EVEN_K: tl.constexpr):
    """Masks of the blocks [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N] that lie at ``k0`` of K."""
    if EVEN_K:
        left = in_m[:, None]
        right = in_n[None, :]
    else:
        left = in_m[:, None] & (rk[None, :] < K - k0)
        right = in_n[None, :] & (rk[:, None] < K - k0)
    return left, right
