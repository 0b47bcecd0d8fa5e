"""The persistent form of the GEMM of gemm.py, for sm_90 and up: operands come by TMA.

As many programs as the device holds at a time walk over the tiles of c, and read a and b through
tensor descriptors that each program makes on the device: the copy engine computes addresses, zeroes
what lies past an edge and needs no register for either. A descriptor asks for a unit stride on one
axis, and for a base and a row length that divide by 16 bytes (PTX ISA, tensor maps); `described`
says whether a matrix has one. Values are those of a sum in the order of K by float32 accumulators,
as in the pointer form; which program makes a tile does not change them.
"""

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.epilogue import finish
from bigops.kernels.common.tile_walk import banded_tile

_BLOCKS = 512  # bytes to which torch's caching allocator aligns
_MAX_STRIDE = 2**40  # bytes, past which a tensor map has no stride


@triton.jit
def gemm_persistent(
    a,  # [M, K], or [K, M] in memory where not A_ROWS
    b,  # [K, N], or [N, K] in memory where not B_ROWS; gated 2N: gate columns, then up columns
    bias,  # [N] or [2N] or None
    residual,  # [M, N] or None
    c,  # [M, N] out, rows contiguous
    preact,  # [M, N] or [M, 2N] out, rows contiguous, or None
    M,
    N,
    K,
    stride_a,  # of a as it lies in memory, from row to row
    stride_b,
    stride_rm,
    stride_rn,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """c = act(a b + bias) + residual; each program makes every num_programs-th tile of c."""
    width = N * 2 if GATED else N  # columns of b
    if A_ROWS:
        a_map = tl.make_tensor_descriptor(a, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
    else:
        a_map = tl.make_tensor_descriptor(a, [K, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
    if B_ROWS:
        b_map = tl.make_tensor_descriptor(b, [K, width], [stride_b, 1], [BLOCK_K, BLOCK_N])
    else:
        b_map = tl.make_tensor_descriptor(b, [width, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = banded_tile(tile, tiles_m, band, GROUP_M)
        row0 = tile_m * BLOCK_M
        col0 = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if GATED:
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            a_block = a_map.load([row0, k0]) if A_ROWS else a_map.load([k0, row0]).T
            b_block = b_map.load([k0, col0]) if B_ROWS else b_map.load([col0, k0]).T
            acc = tl.dot(a_block, b_block, acc, input_precision=PRECISION)
            if GATED:
                # Gate columns past N are up columns: they reach columns of c past N, not stored.
                u_block = b_map.load([k0, N + col0]) if B_ROWS else b_map.load([N + col0, k0]).T
                up = tl.dot(a_block, u_block, up, input_precision=PRECISION)
        finish(
            acc,
            up if GATED else acc,
            bias,
            residual,
            c,
            preact,
            M,
            N,
            stride_rm,
            stride_rn,
            N,
            tile_m,
            col0,
            ACT,
            GATED,
            PARTS,
        )


def described(t: Tensor) -> bool:
    """Whether a matrix may be read through a tensor descriptor; see the head of this file."""
    if 1 not in t.stride() or t.numel() == 0 or t.data_ptr() % 16:
        return False
    step = row_step(t) * t.element_size()
    return 0 < step < _MAX_STRIDE and step % 16 == 0


def row_step(t: Tensor) -> int:
    """Elements between the rows of a matrix as it lies in memory, whichever axis those are."""
    return t.stride(0) if rows_are_rows(t) else t.stride(1)


def rows_are_rows(t: Tensor) -> bool:
    """Whether the rows of a matrix are those that lie in memory, rather than its columns."""
    return t.stride(1) == 1


def with_scratch(device: torch.device, launch: Callable[[], object]) -> None:
    """Call ``launch``; its kernels find memory for descriptors made on the device.

    Triton asks its allocator for that memory at launch. One that the user has set stays as it is:
    ours holds inside ``launch`` alone, since triton keeps the allocator in a context variable. The
    memory is torch's, taken and given back on torch's current stream, which is also the one that
    triton launches on: a later taker's kernels run after ours, and under capture it lies in the
    pool of the graph.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        assert alignment <= _BLOCKS, f"scratch memory aligned to {alignment} bytes"
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        launch()

    contextvars.copy_context().run(run)
