"""Which of the candidate tiles serves a product: a model of the clocks it takes, nothing is timed.

Shapes are taken by bucket (`bucket`), at the largest of the bucket. For a tile of BLOCK_M rows,
BLOCK_N columns and BLOCK_K of what is summed over:

- Wave quantisation: a device with S multiprocessors gives the busiest of them
  ``turns = ceil(tiles / S)`` tiles; the last, partly filled turn costs as much as a full one. Rows
  and columns by which tiles overhang the product are part of that.
- Tile efficiency: a step along K costs its products, at the rate of the unit that makes them, and
  its loads from the L2 cache, at `LOAD`: the two overlap in part, and their sum is at most twice
  the time of the longer. Products grow with the area of a tile and loads with its edges, so small
  tiles pay more for loads.
- Occupancy: a multiprocessor holds as many programs as the GPU report says (``programs`` of a
  config). With `num_stages` - 1 steps of each of them in flight, a step costs at least that share
  of `LATENCY`; and while one starts or stores its tile, at `STORE`, the others go on.
- A program of the pointer form waits for its first loads once a tile; a persistent one once, and
  for `MAPS`, in which it makes its tensor descriptors.

Rates are clocks and bytes of one multiprocessor. The model ranks tiles; it is no forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bigops.kernels.common.tiles import TileConfig

LEAST, MOST = 16, 65536  # sizes below and above share a bucket
LOAD = 48  # bytes a clock: the L2 cache of an A100 gives 5120 to 108 multiprocessors (whitepaper)
STORE = 16  # bytes a clock: DRAM of an H100, 3.35 TB/s at 1.8 GHz for 132
LATENCY = 600  # clocks from the issue of a load that misses the L2 cache
MAPS = 1000  # clocks in which two tensor descriptors are written to memory and become visible


class Device(NamedTuple):
    """Figures of a device, from its maker's data sheet."""

    multiprocessors: int
    half_products: int  # multiply-adds a clock of one multiprocessor, of bfloat16 or float16
    f32_products: int  # likewise, of float32 where tf32 is not allowed


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _up(size: int) -> int:
    return min(max(LEAST, 1 << max(size - 1, 0).bit_length()), MOST)


def rounded(m: int, n: int, k: int) -> tuple[int, int, int]:
    """The largest shape of the bucket of (m, n, k)."""
    return _up(m), _up(n), _up(k)


def bucket(m: int, n: int | None = None, k: int | None = None) -> str:
    """Name the shapes that share a tile, by all sizes or, where only rows matter, by M alone.

    Each size is rounded up to a power of two from 16 to 65536: (60, 4000, 4096) is in
    "m64-n4096-k4096".
    """
    named = zip("mnk", (m, n, k), strict=True)
    return "-".join(f"{name}{_up(size)}" for name, size in named if size is not None)


def clocks(
    config: TileConfig, device: Device, dtype: str, m: int, n: int, k: int, gated: bool
) -> float:
    """What the model at the head of this file gives for [m, k] times [k, n] ([k, 2n] gated)."""
    single = dtype == "f32"
    itemsize, rate = (4, device.f32_products) if single else (2, device.half_products)
    columns = config.block_n * (2 if gated else 1)
    area = config.block_m * columns
    turns = _ceil(_ceil(m, config.block_m) * _ceil(n, config.block_n), device.multiprocessors)
    held = min(config.programs, turns)
    work = area / rate + (config.block_m + columns) * itemsize / LOAD
    step = max(config.block_k * work, LATENCY / (max(config.num_stages - 1, 1) * held))
    finish = config.block_m * config.block_n * itemsize / STORE
    if config.persistent:
        around = turns * finish / held + LATENCY + MAPS
    else:
        around = turns * (finish + LATENCY) / held
    return turns * _ceil(k, config.block_k) * step + around


def best(
    candidates: Sequence[TileConfig],
    device: Device,
    dtype: str,
    m: int,
    n: int,
    k: int,
    gated: bool,
) -> TileConfig:
    """The candidate of fewest clocks; the first of those that tie. dtype: "f32", "bf16", "f16"."""
    return min(candidates, key=lambda config: clocks(config, device, dtype, m, n, k, gated))
